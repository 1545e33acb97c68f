"""The balance losses of a tape, and updates once per optimizer step: selection biases and adaptive weights."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..contract import Entry, Loads, Tape, device_of_ranks, several_ranks, sum_over_ranks, unwrapped_modules
from ..routing.balance.balance import adaptive_weight
from ..routing.balance.terms import balance_sums, balance_terms
from ..routing.router import Router
from .base import MoELayer, entry_name


@dataclass(frozen=True)
class AuxLosses:
    """The balance losses of a tape.

    Attributes:
        total: float32 (), the weighted sum over layers and terms.
        terms: each term unweighted, the mean over the passes it applies to, detached: for the log.
    """

    total: Tensor
    terms: dict[str, Tensor]


def aux_loss(tape: Tape, group: dist.ProcessGroup | None = None, step: Sequence[Tape] = ()) -> Tensor:
    """Return the weighted balance losses of all recorded passes, to be added to the task's loss. See ``aux_losses``."""
    return aux_losses(tape, group, step).total


def aux_losses(tape: Tape, group: dist.ProcessGroup | None = None, step: Sequence[Tape] = ()) -> AuxLosses:
    """Return the weighted sum and the unweighted terms of the balance losses of all recorded passes.

    Statistics cover the tokens of all ranks, in one collective for all layers, unless a layer's ``scope`` is "rank";
    the gradient is exact once DDP or FSDP has averaged it over the ranks. All ranks call it for the same passes of
    these layers, in any order, which one small collective checks (not in compiled code).

    Args:
        tape: the passes.
        group: the ranks that have the same layers and other tokens, over which gradients are averaged: under pipeline
            or tensor parallelism the data-parallel ones. None: all.
        step: tapes of all micro-batches of an optimizer step, this one's among them, as a first forward without
            gradients has recorded them. The losses are then those of the whole step, as if it were one batch, and the
            gradients of its micro-batches add up to that batch's: add each loss undivided. It costs that forward.

    Raises:
        ValueError: a pass had no context field that one of its terms reads, or one of another form; or the tape has
            only the loads; or ``tape`` is not a tape; or a tape of ``step`` lacks a pass.
        RuntimeError: a pass ran without gradients although its router trains, as under reentrant checkpointing; or the
            ranks recorded passes of different layers, which all of them raise.
    """
    if not isinstance(tape, Tape):
        raise ValueError(
            f"aux_loss takes the tape of a forward, not a {type(tape).__name__}: write `with core.record(model) as "
            "tape: loss = ...`, then `(loss + core.aux_loss(tape)).backward()`"
        )
    entries: list[tuple[Entry, frozenset[str]]] = []
    sums: list[dict[str, Tensor]] = []
    for entry in tape.entries:
        if isinstance(entry.routing, Loads):
            raise ValueError(f"layer {entry.name!r} is on this tape with its loads alone: losses are taken before them")
        if entry.needs_grad and not entry.has_grad and torch.is_grad_enabled():
            raise RuntimeError(
                f"layer {entry.name!r} ran without gradients, so its balance loss has none: "
                "use checkpoint(..., use_reentrant=False), or freeze its router"
            )
        given = {**entry.balance.weights(), **entry.extra_weights}
        # A weight that moves is a tensor, which the host does not read.
        wanted = frozenset(t for t, w in given.items() if t in entry.terms and (isinstance(w, Tensor) or w > 0))
        if wanted:
            entries.append((entry, wanted))
            sums.append(balance_sums(entry.routing, wanted, entry.balance, entry.context, entry.shared_gate_T))
    if step:
        sums = _over_step(entries, sums, step)
    shared = [i for i, (entry, _) in enumerate(entries) if entry.balance.scope == "global"]
    # By name: ranks may run their layers in different orders.
    shared.sort(key=lambda i: entries[i][0].name)
    names = [entries[i][0].name for i in shared]
    added, world = _all_reduce(names, [sums[i] for i in shared], tape.shared_on, group)
    for i, entry_sums in zip(shared, added, strict=True):
        sums[i] = entry_sums
    total: Tensor | None = None
    seen: dict[str, list[Tensor]] = {}
    for (entry, wanted), entry_sums in zip(entries, sums, strict=True):
        own = {
            n: w.clone() if isinstance(w, Tensor) else w for n, w in entry.extra_weights.items()
        }  # they move in place
        factors: dict[str, float | Tensor] = {**entry.balance.weights(), **own}
        if entry.load_balancing_weight is not None:
            factors["load_balancing_loss"] = entry.load_balancing_weight.clone()
        # A term of weight 0 is not wanted: it could be NaN.
        for name, value in balance_terms(entry_sums, wanted, entry.balance).items():
            seen.setdefault(name, []).append(value.detach())
            part = factors[name] * value
            if world > 1 and entry.balance.scope == "global":
                # Each rank holds only its own tokens' part of the gradient, and DDP averages: the mean of
                # world * parts is it.
                part = part.detach() + world * (part - part.detach())
            total = part if total is None else total + part
    if total is None:  # nothing to balance, or only a load term, in evaluation
        return AuxLosses(torch.zeros(()), {})
    return AuxLosses(total, {name: torch.stack(values).mean() for name, values in seen.items()})


def _over_step(
    entries: list[tuple[Entry, frozenset[str]]], sums: list[dict[str, Tensor]], step: Sequence[Tape]
) -> list[dict[str, Tensor]]:
    """Return the sums of all micro-batches, with the gradient of this one's: pass by pass of each layer."""
    passes: Counter[str] = Counter()
    added = []
    for (entry, wanted), own in zip(entries, sums, strict=True):
        number, passes[entry.name] = passes[entry.name], passes[entry.name] + 1
        total = {name: torch.zeros_like(t) for name, t in own.items()}
        for tape in step:
            same = [other for other in tape.entries if other.name == entry.name]
            if len(same) <= number:
                raise ValueError(f"a micro-batch of the step has no pass {number + 1} of layer {entry.name!r}")
            of = same[number]
            for name, t in balance_sums(of.routing, wanted, of.balance, of.context, of.shared_gate_T).items():
                total[name] += t.detach()
        added.append({name: total[name] + (t - t.detach()) for name, t in own.items()})
    return added


def _all_reduce(
    names: list[str],
    sums: list[dict[str, Tensor]],
    device: torch.device | None,
    group: dist.ProcessGroup | None,
) -> tuple[list[dict[str, Tensor]], int]:
    """Add each sum over the ranks, in one collective; the gradient is still the gradient of this rank's part.

    Args:
        names: the layer of each.
        sums: sums of this rank.
        device: device on which a rank without sums takes part; None: it does not.
        group: the ranks; None: all.
    """
    if not several_ranks(group) or (not sums and device is None):
        return sums, 1
    _check_ranks_agree(
        names,
        sums,
        "the ranks recorded different passes, so their balance losses cannot be added up: {}; "
        "run these layers alike on all ranks, or give them Balance(scope='rank')",
        device,
        group,
    )
    if not sums:
        return sums, 1
    added = iter(sum_over_ranks([t for s in sums for t in s.values()], group))
    return [{name: next(added) for name in s} for s in sums], dist.get_world_size(group)


def _check_ranks_agree(
    names: list[str],
    sums: list[dict[str, Tensor]],
    refusal: str,
    device: torch.device | None = None,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Raise a ``RuntimeError`` on every rank if their sums differ in layers or shapes.

    Args:
        names: the layer of each.
        sums: sums of this rank, which may have none.
        refusal: the error's message, with a place for the difference.
        device: device on which the ranks compare; None: the device of the sums.
        group: the ranks; None: all.
    """
    if torch.compiler.is_compiling():
        return
    if device is None:
        device = next((t.device for s in sums for t in s.values()), None) or device_of_ranks(group)
    layout = [
        (name, *((key, tuple(t.shape)) for key, t in of_layer.items()))
        for name, of_layer in zip(names, sums, strict=True)
    ]
    code = int.from_bytes(hashlib.sha256(repr(layout).encode()).digest()[:7], "big")
    extremes = torch.tensor([code, -code], device=device)
    dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=group)
    largest, minus_smallest = extremes.tolist()
    if largest == -minus_smallest:
        return
    layouts: list[list[tuple[str, object]]] = [[] for _ in range(dist.get_world_size(group))]
    dist.all_gather_object(layouts, layout, group=group)
    times = [Counter(name for name, *_ in of_rank) for of_rank in layouts]
    differ = [
        f"{name!r} ({' and '.join(str(counts[name]) for counts in times)} times)"
        for name in sorted(set(chain.from_iterable(times)))
        if len({counts[name] for counts in times}) > 1
    ]
    raise RuntimeError(refusal.format(", ".join(differ) or "in another order, or of other sizes"))


def update_expert_bias(model: nn.Module, tape: Tape, group: dist.ProcessGroup | None = None) -> None:
    """Update the selection biases by the loads on the tape, the adaptive weights of ``Balance`` by its drop rates and a
    router's own weights by its counts, and tell each router that a step is over, for its annealing: once per optimizer
    step, in training.

    Under accumulation give it the micro-batches' loads merged: ``steps = steps.merge(tape.loads())``. The loads of all
    ranks are added in one collective, so all of them call it, with the same layers: one small collective checks it. A
    router that several layers share moves once, by the sum of their loads.

    Args:
        model: the recorded model, or the same one wrapped.
        tape: the passes since the last step.
        group: as in ``aux_losses``.

    Raises:
        ValueError: the tape has a pass of a layer that the model does not name so.
        RuntimeError: the ranks have biases or adaptive weights of different layers, which all of them raise.
    """
    every = {name: m for name, m in unwrapped_modules(model) if isinstance(m, MoELayer)}
    _check_names(every, tape)
    layers = {name: m for name, m in every.items() if m.training}
    routers = {entry_name(name, end): r for name, m in layers.items() for end, r in m.routers().items()}
    each: dict[int, Router] = {id(r): r for r in routers.values()}
    loads = {key: torch.zeros_like(r.expert_bias) for key, r in each.items() if r.expert_bias is not None}
    counts = {
        key: next(r.buffers()).new_zeros(r.num_counts, dtype=torch.float32) for key, r in each.items() if r.num_counts
    }
    drops = {n: m.load_balancing_weight.new_zeros(2) for n, m in layers.items() if m.load_balancing_weight is not None}
    if several_ranks(group):
        first = {id(r): name for name, r in reversed(routers.items())}
        names = [*(first[key] for key in (*loads, *counts)), *drops]
        sums = [{kind: t} for kind, of in (("load", loads), ("counts", counts), ("drops", drops)) for t in of.values()]
        _check_ranks_agree(
            names,
            sums,
            "the ranks train different layers, so the loads of their experts cannot be added up: {}; "
            "every rank needs the same layers with expert_bias or Balance(adaptive=True)",
            group=group,
        )
    for router in each.values():
        router.after_step()
    if not loads and not counts and not drops:
        return
    for entry in tape.entries:
        key = id(routers.get(entry.name))
        if key in loads:
            loads[key] += entry.routing.chosen_per_expert_E
        if key in counts:
            of_pass = entry.routing.counts if isinstance(entry.routing, Loads) else entry.routing.evidence.counts
            if of_pass is not None:
                counts[key] += of_pass
        if entry.name in drops:
            chosen_E, computed_E = entry.routing.chosen_per_expert_E, entry.routing.tokens_per_expert_E
            drops[entry.name] += torch.stack((chosen_E.sum() - computed_E.sum(), chosen_E.sum()))
    if several_ranks(group):
        added = iter(sum_over_ranks([*loads.values(), *counts.values(), *drops.values()], group))
        loads, counts = {key: next(added) for key in loads}, {key: next(added) for key in counts}
        drops = {n: next(added) for n in drops}
    for key, load in loads.items():
        each[key].update_expert_bias(load)
    for key, count in counts.items():
        each[key].after_counts(count)
    for name, (dropped, chosen) in drops.items():
        weight = layers[name].load_balancing_weight
        assert weight is not None
        # In place: a compiled layer and a captured graph see the same buffer.
        moved = adaptive_weight(weight, dropped / chosen.clamp_min(1), layers[name].balance)
        weight.copy_(torch.where(chosen > 0, moved, weight))


def _check_names(layers: Mapping[str, MoELayer], tape: Tape) -> None:
    """Raise an error for a tape of another model, or of a part of it: its passes would update nothing."""
    for entry in {entry.name: None for entry in tape.entries}:
        if not any(_is_of(entry, name, layer) for name, layer in layers.items()):
            named = ", ".join(repr(name) for name in layers) or "none"
            raise ValueError(f"the tape has a pass of layer {entry!r}, the model's are {named}: record this very model")


def _is_of(entry: str, name: str, layer: MoELayer) -> bool:
    """Return whether an entry of this name is a pass of the layer of that name."""
    if name and entry != name and not entry.startswith(f"{name}."):
        return False
    return layer.names_entry(entry[len(name) :].removeprefix("."))
