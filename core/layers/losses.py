"""The balance losses of a tape, and what moves once per optimizer step: selection biases and adaptive weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..contract import Entry, Tape
from ..routing.balance import adaptive_weight, balance_sums, balance_terms
from .moe import entry_name, moe_layers


@dataclass(frozen=True)
class AuxLosses:
    """``total``: the weighted sum over layers and terms. ``terms``: each term unweighted, the mean over the passes it
    applies to, for the log; detached."""

    total: Tensor
    terms: dict[str, Tensor]


def aux_loss(tape: Tape) -> Tensor:
    """The weighted balance losses of all recorded passes, to be added to the task's loss. See ``aux_losses``."""
    return aux_losses(tape).total


def aux_losses(tape: Tape) -> AuxLosses:
    """Weighted sum and unweighted terms of the balance losses of all recorded passes, each by its layer's ``Balance``.

    Statistics are those of the tokens of all ranks, in one collective for all layers, unless a layer's ``scope`` is
    "rank"; the gradient is exact once DDP or FSDP has averaged it over the ranks.

    Raises:
        ValueError: a pass had no context field that one of its terms reads.
        RuntimeError: a pass ran without gradients although its router trains, as under reentrant checkpointing.
    """
    entries: list[tuple[Entry, frozenset[str]]] = []
    sums: list[dict[str, Tensor]] = []
    for entry in tape.entries:
        if entry.needs_grad and not entry.has_grad and torch.is_grad_enabled():
            raise RuntimeError(
                f"layer {entry.name!r} ran without gradients, so its balance loss has none: "
                "use checkpoint(..., use_reentrant=False), or freeze its router"
            )
        given = {**entry.balance.weights(), **entry.extra_weights}
        wanted = frozenset(t for t, weight in given.items() if t in entry.terms and weight > 0)
        if wanted:
            entries.append((entry, wanted))
            sums.append(balance_sums(entry.routing, wanted, entry.balance, entry.context, entry.shared_gate_T))
    shared = [i for i, (entry, _) in enumerate(entries) if entry.balance.scope == "global"]
    added, world = _all_reduce([sums[i] for i in shared])
    for i, entry_sums in zip(shared, added, strict=True):
        sums[i] = entry_sums
    total: Tensor | None = None
    seen: dict[str, list[Tensor]] = {}
    for (entry, wanted), entry_sums in zip(entries, sums, strict=True):
        factors: dict[str, float | Tensor] = {**entry.balance.weights(), **entry.extra_weights}
        if entry.load_balancing_weight is not None:
            factors["load_balancing"] = entry.load_balancing_weight.clone()  # it moves in place
        for name, value in balance_terms(entry_sums, entry.balance).items():
            if name in wanted:  # a term of weight 0 is not in the graph: it could be NaN
                seen.setdefault(name, []).append(value.detach())
                part = factors[name] * value
                if world > 1 and entry.balance.scope == "global":
                    # Each rank holds only its own tokens' part of the gradient, and DDP averages: the mean of
                    # world * parts is it.
                    part = part.detach() + world * (part - part.detach())
                total = part if total is None else total + part
    if total is None:  # nothing to balance, or a load term alone, in evaluation
        return AuxLosses(torch.zeros(()), {})
    return AuxLosses(total, {name: torch.stack(values).mean() for name, values in seen.items()})


def _all_reduce(sums: list[dict[str, Tensor]]) -> tuple[list[dict[str, Tensor]], int]:
    """Add each sum over the ranks, in one collective; the gradient stays that of this rank's part."""
    if not sums or not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return sums, 1
    flat = [t for s in sums for t in s.values()]
    local = torch.cat([t.reshape(-1) for t in flat])
    total = local.detach().clone()
    dist.all_reduce(total)
    added = (local + (total - local.detach())).split([t.numel() for t in flat])
    parts = iter(added)
    return [{name: next(parts).reshape(t.shape) for name, t in s.items()} for s in sums], dist.get_world_size()


def update_expert_bias(model: nn.Module, tape: Tape) -> None:
    """Move the selection biases by the loads on the tape, and the adaptive weights of ``Balance`` by its drop rates,
    and tell each router that a step is over, for what it anneals: once per optimizer step, in training.

    Under accumulation give it the micro-batches' tapes merged: ``steps = steps.merge(tape.detach())``. The loads of all
    ranks are added in one collective.

    Args:
        model: the recorded model, or the same one wrapped.
        tape: the passes since the last step.
    """
    layers = {Tape.clean_name(name): m for name, m in moe_layers(model).items() if m.training}
    routers = {entry_name(name, end): r for name, m in layers.items() for end, r in m.routers().items()}
    for router in {id(r): r for r in routers.values()}.values():  # one shared by two layers steps once
        router.after_step()
    loads = {n: torch.zeros_like(r.expert_bias) for n, r in routers.items() if r.expert_bias is not None}
    drops = {n: m.load_balancing_weight.new_zeros(2) for n, m in layers.items() if m.load_balancing_weight is not None}
    if not loads and not drops:
        return
    for entry in tape.entries:
        if entry.name in loads:
            loads[entry.name] += entry.routing.chosen_per_expert_E
        if entry.name in drops:
            chosen_E, computed_E = entry.routing.chosen_per_expert_E, entry.routing.tokens_per_expert_E
            drops[entry.name] += torch.stack((chosen_E.sum() - computed_E.sum(), chosen_E.sum()))
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        counts = [*loads.values(), *drops.values()]
        flat = torch.cat(counts)
        dist.all_reduce(flat)
        parts = iter(flat.split([len(v) for v in counts]))
        loads, drops = {n: next(parts) for n in loads}, {n: next(parts) for n in drops}
    for name, load in loads.items():
        routers[name].update_expert_bias(load)
    for name, (dropped, chosen) in drops.items():
        weight = layers[name].load_balancing_weight
        assert weight is not None
        # In place: a compiled layer and a captured graph see the same buffer.
        moved = adaptive_weight(weight, dropped / chosen.clamp_min(1), layers[name].balance)
        weight.copy_(torch.where(chosen > 0, moved, weight))
