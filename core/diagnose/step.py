"""A training step examined: the routers' gradients from the task's loss, and how often the balance loss is in the
sum."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..contract import record, several_ranks, unwrapped_modules
from ..layers import MoELayer, aux_losses
from ..routing.balance.balance import BalanceWeights
from .foreign import ForeignRouter, foreign_passes, foreign_routers
from .passes import Pass
from .ranks import parallel, summed

Loss = Callable[[Any, Any], Tensor]
"""Takes a model and a batch, and returns the loss that a training step minimizes, ()."""

VISIBLE = 1e-4
"""A balance loss whose gradient is a smaller part of the whole is lost in the rounding of float32, whose numbers have 7
digits: how often it was added cannot be read from the difference of two gradients."""


@dataclass(frozen=True)
class StepFigures:
    """Figures of a layer from one training step.

    Attributes:
        router_gradient: root mean square of the task's gradient in the router's weights, over that in the experts';
            None: the router has no weights, or the experts have no gradient.
        is_frozen: whether all of the router's weights are frozen.
        is_balanced: whether a balance loss has a weight.
        times: how often the balance loss is in the loss; None: it cannot be told.
        over_padding: whether a foreign balance loss covers all tokens, padding included.
    """

    router_gradient: float | None = None
    is_frozen: bool = False
    is_balanced: bool = False
    times: float | None = None
    over_padding: bool = False


def step_figures(
    model: nn.Module,
    batch: Any,
    loss: Loss,
    *,
    aux_weight: float = 1.0,
    real_BS: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> dict[str, StepFigures]:
    """Run two training steps without an update, with the balance losses and without, and compare their gradients.

    Weights, gradients, buffers, modes and random numbers are unchanged afterwards.

    Args:
        model: any module with MoE layers, ours or foreign.
        batch: a batch of the training.
        loss: as a step minimizes it, balance losses included.
        aux_weight: weight of the balance losses in the loss, on top of the layers' own weights.
        real_BS: bool (B, S), False for padding; None: not known.
        group: the ranks, all of which call this with a batch of their own; gradients are the means over them, as DDP
            and FSDP make them. What FSDP2 shards is put together meanwhile. None: all.

    Raises:
        ValueError: the loss has no gradient.
    """
    with parallel().whole_parameters(model):
        return _step_figures(model, batch, loss, aux_weight, real_BS, group)


def _step_figures(
    model: nn.Module,
    batch: Any,
    loss: Loss,
    aux_weight: float,
    real_BS: Tensor | None,
    group: dist.ProcessGroup | None,
) -> dict[str, StepFigures]:
    layers = {name: m for name, m in unwrapped_modules(model) if isinstance(m, MoELayer)}
    foreign = foreign_routers(model)
    parts: dict[str, tuple[nn.Module, nn.Module | None]] = {name: (m.router, m.experts) for name, m in layers.items()}
    parts |= {name: (r.module, r.experts) for name, r in foreign.items()}
    experts = {name: _trained(of) for name, (_, of) in parts.items()}
    routers = {name: _trained(of, without=experts[name]) for name, (of, _) in parts.items()}
    wanted = list({id(p): p for of in (*routers.values(), *experts.values()) for p in of}.values())
    if not wanted:
        return {name: StepFigures(is_frozen=any(True for _ in of.parameters())) for name, (of, _) in parts.items()}
    with _untouched(model):
        model.train()
        task, whole = (
            _run(model, batch, loss, wanted, layers, foreign, with_balance, group) for with_balance in (False, True)
        )
    foreign_times, over_padding = _foreign_times(model, foreign, task, whole, real_BS, group)
    figures = {}
    for name, of in routers.items():
        times = foreign_times if name in foreign and foreign[name].has_loss else None
        g_task, g_whole = _flat(of, task.gradients), _flat(of, whole.gradients)
        # Losses that a router adds by itself are in both.
        g_aux = _flat(of, whole.of_balance) - _flat(of, task.of_balance)
        if name in layers and of and float(g_aux.norm()) > _visible(of) * float(g_whole.norm()):
            times = float((g_whole - g_task) @ g_aux / (g_aux @ g_aux)) / aux_weight
        scale = _rms_of_ranks(experts[name], task.gradients, group)
        balance = layers[name].balance.weights() if name in layers else {"": float(foreign[name].has_loss)}
        figures[name] = StepFigures(
            router_gradient=_rms(g_task) / scale if of and scale > 0 else None,
            is_frozen=not of and any(True for _ in parts[name][0].parameters()),
            is_balanced=any(weight > 0 for weight in balance.values()),
            times=times,
            over_padding=over_padding and name in foreign,
        )
    return figures


Gradients = Mapping[int, Tensor]
"""The gradient of each parameter that has one, by the parameter's ``id``."""


@dataclass(frozen=True)
class _Run:
    """One forward and backward: the loss, its gradients, the balance losses' gradients by layer, the foreign passes."""

    value: float
    gradients: Gradients
    of_balance: Gradients
    passes: list[Pass]


def _run(
    model: nn.Module,
    batch: Any,
    loss: Loss,
    wanted: list[nn.Parameter],
    layers: Mapping[str, MoELayer],
    foreign: Mapping[str, ForeignRouter],
    with_balance: bool,
    group: dist.ProcessGroup | None,
) -> _Run:
    without = contextlib.nullcontext() if with_balance else _without_balance(model, layers.values())
    with without, _seeded(), torch.enable_grad(), foreign_passes(foreign, batch) as passes, record(model) as tape:
        value = loss(model, batch)
        if not value.requires_grad:
            raise ValueError("the loss of a training step has no gradient: it must be a function of the weights")
        aux = aux_losses(tape, group).total
        if next(parallel().sharded_modules(model), None) is not None:
            aux = aux + 0 * value  # FSDP2 follows only a backward that starts at the model's output
        of_balance = _gradients(aux, wanted, group, keep=True) if aux.requires_grad else {}
        return _Run(float(value.detach()), _gradients(value, wanted, group), of_balance, passes)


def _gradients(
    value: Tensor, wanted: list[nn.Parameter], group: dist.ProcessGroup | None, keep: bool = False
) -> Gradients:
    """Return the gradients, means over the ranks; sharded experts have the sum over the tokens of the ranks that share
    them, over the number of these ranks."""
    grads = torch.autograd.grad(value, wanted, retain_graph=keep, allow_unused=True)
    # Rows of a table have sparse gradients.
    dense = {
        id(p): parallel().local_part(g.to_dense()).detach() for p, g in zip(wanted, grads, strict=True) if g is not None
    }
    if not several_ranks(group):
        return dense
    for p in wanted:
        mesh = getattr(p, "device_mesh", None)  # of a DTensor, which is sharded
        if mesh is not None:
            if id(p) in dense:
                dense[id(p)] = dense[id(p)] / mesh.size()
            continue
        # A rank that does not use a parameter takes part in the mean.
        mean = dense[id(p)].clone() if id(p) in dense else torch.zeros_like(p)
        dist.all_reduce(mean, group=group)
        dense[id(p)] = mean / dist.get_world_size(group)
    return dense


def _trained(module: nn.Module | None, without: Iterable[nn.Parameter] = ()) -> list[nn.Parameter]:
    left_out = {id(p) for p in without}
    return [] if module is None else [p for p in module.parameters() if p.requires_grad and id(p) not in left_out]


def _flat(parameters: Iterable[nn.Parameter], gradients: Gradients) -> Tensor:
    """Return the gradients of some parameters one after the other, float64; zeros if there is none."""
    parts = [
        gradients[id(p)].double().flatten()
        if id(p) in gradients
        else p.new_zeros(parallel().local_part(p).numel(), dtype=torch.float64)
        for p in parameters
    ]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64)


def _visible(parameters: Iterable[nn.Parameter]) -> float:
    """Return ``VISIBLE``, more for parameters that are rounded more coarsely."""
    coarsest = max(torch.finfo(p.dtype).eps for p in parameters)
    return VISIBLE * coarsest / torch.finfo(torch.float32).eps


def _rms_of_ranks(parameters: Iterable[nn.Parameter], gradients: Gradients, group: dist.ProcessGroup | None) -> float:
    """Return the root mean square of some parameters' gradients, all ranks' parts of them together."""
    flat = _flat(parameters, gradients)
    sums = torch.stack((flat.square().sum().cpu(), torch.tensor(float(flat.numel()), dtype=torch.float64)))
    square, count = summed([sums], group)[0].tolist()
    return math.sqrt(square / count) if count else 0.0


def _rms(flat: Tensor) -> float:
    return float(flat.square().mean().sqrt()) if flat.numel() else 0.0


def _foreign_times(
    model: nn.Module,
    foreign: Mapping[str, ForeignRouter],
    task: _Run,
    whole: _Run,
    real_BS: Tensor | None,
    group: dist.ProcessGroup | None,
) -> tuple[float | None, bool]:
    """Return how often the balance loss of a foreign model is in the loss, and whether it counts padding.

    transformers' loss is one for all layers (arXiv 2101.03961, eq. 4-6, over all K choices): the loss with it and the
    loss without it differ by its weight times its value. Each rank has the loss of its own tokens: the result is the
    mean over the ranks, and padding that one of them counts.
    """
    passes = [p for p in whole.passes if foreign[p.layer].has_loss and p.logits_TE is not None]
    weight = next((value for _, value in _foreign_weights(model)), 0.0)
    if not passes or not weight:
        return None, False
    value = (whole.value - task.value) / weight
    every = _switch_loss(passes, None)
    real = every if real_BS is None else _switch_loss(passes, real_BS.flatten())
    is_padded = abs(every - real) > 0.01 * real and abs(value - every) < 0.1 * abs(every - real)
    own = torch.tensor([value / (every if is_padded else real), float(is_padded), 1.0], dtype=torch.float64)
    times, padded, ranks = summed([own], group)[0].tolist()
    return times / ranks, padded > 0


def _switch_loss(passes: list[Pass], real_T: Tensor | None) -> float:
    """Return ``E sum_e f_e P_e`` over the tokens of all passes together, f_e summing to K."""
    E = passes[0].num_experts
    chosen_E, score_E, tokens = torch.zeros(E), torch.zeros(E), 0.0
    for one in passes:
        assert one.logits_TE is not None
        assert one.expert_N is not None
        T = one.num_tokens
        keep_T = torch.ones(T) if real_T is None or len(real_T) != T else real_T.float().cpu()
        keep_N = keep_T.repeat_interleave(len(one.expert_N) // T)
        chosen_E += torch.zeros(E + 1).index_add(0, one.expert_N.cpu(), keep_N)[:E]
        score_E += (one.logits_TE.cpu().softmax(-1)[:, :E] * keep_T[:, None]).sum(0)
        tokens += float(keep_T.sum())
    return float(E * (chosen_E * score_E).sum() / max(tokens, 1.0) ** 2)


# ---- the model as it was


@contextlib.contextmanager
def _untouched(model: nn.Module) -> Iterator[None]:
    """Put modes and buffers back after the ``with`` block."""
    modes = {module: module.training for module in model.modules()}
    buffers = {name: b.detach().clone() for name, b in model.named_buffers()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, b in model.named_buffers():
                b.copy_(buffers[name])
        for module, mode in modes.items():
            module.training = mode


@contextlib.contextmanager
def _seeded() -> Iterator[None]:
    """Draw the same random numbers in each block, and leave the generators as they were."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


@contextlib.contextmanager
def _without_balance(model: nn.Module, layers: Iterable[MoELayer]) -> Iterator[None]:
    """Set the weights of the balance losses to zero inside the ``with`` block, also in foreign models."""
    kept = [(layer, layer.balance, layer.load_balancing_weight) for layer in layers]
    zero: dict[str, Any] = dict.fromkeys(BalanceWeights().weights(), 0.0)
    owners = _foreign_weights(model)
    try:
        for layer, balance, _ in kept:
            layer.balance, layer.load_balancing_weight = replace(balance, **zero, adaptive=False), None
        for owner, _ in owners:
            owner.router_aux_loss_coef = 0.0
        yield
    finally:
        for layer, balance, weight in kept:
            layer.balance, layer.load_balancing_weight = balance, weight
        for owner, value in owners:
            owner.router_aux_loss_coef = value


def _foreign_weights(model: nn.Module) -> list[tuple[Any, float]]:
    """Return the modules and configurations of a transformers model that hold a balance loss's weight, and it."""
    owners: dict[int, tuple[Any, float]] = {}
    for module in model.modules():
        for owner in (module, getattr(module, "config", None)):
            weight = getattr(owner, "router_aux_loss_coef", None)
            if isinstance(weight, (int, float)) and weight:
                owners[id(owner)] = (owner, float(weight))
    return list(owners.values())
