"""``grow_experts`` adds experts to a layer that may be trained; ``freeze_experts`` and ``hold_experts`` keep some of
them as they are.

The gate of the larger layer is rebuilt from the router's config. An axis of one of its tensors that is longer than
before counts the experts, so that no name of a parameter is asked for, and a gate of yours grows as well.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor, nn

from ...experts import Experts
from ...fields import Count, OneOf, check_values
from ...layers import MoE
from ...routing.router import Router
from ..read.parts import axis_of_experts, like, num_groups, parts_of, set_num_experts, tensors_of_experts, width_of

STARTS = ("fresh", "copy")


@torch.no_grad()
def grow_experts(
    layer: MoE,
    n: int,
    freeze: bool = False,
    *,
    start: str = "fresh",
    loads_E: Tensor | Sequence[float] | None = None,
    init: Callable[[Tensor], Any] | None = None,
) -> tuple[int, ...]:
    """Add n routed experts to a layer, in place: Lifelong-MoE (arXiv 2305.12281), or any larger E in mid-training.

    The experts' stacked tensors, the gate's rows and the selection bias grow, by new parameters: make the optimizer
    after it. The layer then has the tensors of one that is built for E + n experts, and its ``state_dict`` loads into
    such a layer. A router that sees groups of experts gets as many new ones in each group, at the group's end;
    else the new experts are the last ones.

    A token that chooses no new expert comes out as before. Three quantities know all experts, and so the new ones as
    well: gates that are a softmax over all E, of which the new experts take their share; the capacity, a share of the
    tokens for each; and soft slots and merged experts, which never leave an expert out.

    Args:
        layer: ``MoE``, ``SoftMoE`` or ``MergedMoE``, whose router a ``RouterConfig`` has built.
        n: number of experts to add.
        freeze: the old experts and their rows of the gate stay as they are: see ``freeze_experts``.
        start: how the new experts are initialized: "fresh", as such experts are built; "copy", copies of the most used
            ones, the first copy of the most used, within its group. Rows of the gate are fresh either way: equal rows
            would choose equally, and a copy would stay one.
        loads_E: (E,), how often each expert was chosen, as ``Routing.chosen_per_expert_E`` says it; for "copy".
        init: fills one (in, out) matrix of a fresh expert in place, as in ``Experts.init_each``; None: the start that
            experts have of themselves. The networks of the apps initialize theirs otherwise
            (``nn.init.xavier_uniform_``).

    Returns:
        the indices of the new experts.

    Raises:
        ValueError: ``n`` is below 1; the layer has another kind; its router goes by a fixed table, or otherwise not by
            a row of a gate for each expert; groups, domains or options of the router that do not fit E + n; experts of
            several kinds, or split over ranks; "copy" without loads, or loads of another number.

    Example::

        with core.record(model) as tape:
            model(batch)
        loads_E = tape.entries[0].routing.chosen_per_expert_E
        new = core.grow_experts(layer, 2, freeze=True, start="copy", loads_E=loads_E)
    """
    check_values(Count, n=n)
    check_values(Annotated[str, OneOf(*STARTS)], start=start)
    router, experts = parts_of(layer, "grow")
    E, config = experts.num_experts, router.config
    larger = config.resized(E + n).build(width_of(layer), E + n, router.capacity)
    groups = num_groups(router)
    kept = [e // (E // groups) * ((E + n) // groups) + e % (E // groups) for e in range(E)]
    new = tuple(sorted({*range(E + n)} - {*kept}))
    sources = _sources(loads_E, E, n, groups) if start == "copy" else None
    if sources is None and loads_E is not None:
        raise ValueError(f"loads_E is for start='copy', not for {start!r}")
    grown = _grown_router(router, larger, E + n, kept)
    _grow_stacked(experts, n, kept, new, sources, init)
    for module, name, value in grown:
        setattr(module, name, value)
    set_num_experts(layer, E + n)
    if freeze:
        freeze_experts(layer, kept)
    return new


def freeze_experts(layer: MoE, experts: Collection[int]) -> None:
    """Keep experts of a layer, and their rows of the gate, fixed while the others keep learning.

    Parameters are stacked, so that a part of one cannot have ``requires_grad=False``: a hook on each sets the gradient
    of the frozen rows to zero. Parameters of a gate that all experts share, such as a projection, get
    ``requires_grad=False``; shared experts are not touched.

    Hooks stay through ``load_state_dict``, ``to`` and ``train``. They are not part of a ``state_dict``, a copy or a
    pickle: call this again on the layer that is loaded into, before ``DistributedDataParallel`` or FSDP2 wraps it. An
    optimizer updates a row by more than its gradient if it decays weights, or has momentum from before: see
    ``hold_experts``.

    Args:
        layer: as ``grow_experts`` takes it.
        experts: indices in ``range(E)``; all others learn.

    Raises:
        ValueError: an index is out of range, or a layer that ``grow_experts`` rejects.
    """
    for part in _parts_of_experts(layer, experts):
        if part.axis is None:
            part.parameter.requires_grad_(False)
        else:
            _mask_gradient(part.parameter, part.axis, part.learning)


def hold_experts(optimizer: torch.optim.Optimizer, layer: MoE, experts: Collection[int]) -> None:
    """Put the rows of frozen experts back after each step of an optimizer, which may decay weights or have momentum.

    A step then copies these rows twice. New experts are decayed as the optimizer says.

    Args:
        optimizer: any that steps the parameters of the layer.
        layer: as ``grow_experts`` takes it.
        experts: indices in ``range(E)``, as in ``freeze_experts``.

    Raises:
        ValueError: as ``freeze_experts``.

    Example::

        core.freeze_experts(layer, range(8))
        core.hold_experts(optimizer, layer, range(8))
    """
    held = [
        (part.parameter, part.axis, (~part.learning).nonzero().flatten())
        for part in _parts_of_experts(layer, experts)
        if part.axis is not None and part.parameter.requires_grad
    ]
    kept: list[list[Tensor]] = []  # a stack: an optimizer's step may call its base class's step

    def before(*step: Any) -> None:
        kept.append([p.detach().index_select(axis, row.to(p.device)) for p, axis, row in held])

    def after(*step: Any) -> None:
        with torch.no_grad():
            for (p, axis, row), value in zip(held, kept.pop(), strict=True):
                p.index_copy_(axis, row.to(p.device), value)

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)


class _PartOfExperts(NamedTuple):
    """A parameter with rows of experts.

    Attributes:
        parameter: one of the experts or the router.
        axis: the axis that counts the experts; None for parameters of a gate that all experts share.
        learning: bool (length of the axis,), False where the row stays as it is.
    """

    parameter: Tensor
    axis: int | None
    learning: Tensor


def _parts_of_experts(layer: MoE, frozen: Collection[int]) -> Iterator[_PartOfExperts]:
    """Yield every parameter of a layer's experts and router, with the rows of the frozen experts."""
    router, stacked = parts_of(layer, "grow")
    E = stacked.num_experts
    for e in frozen:
        if not 0 <= e < E:
            raise ValueError(f"expert {e} is not in range({E})")
    learning = torch.tensor([e not in set(frozen) for e in range(E)])
    for parameter in stacked.parameters():
        yield _PartOfExperts(parameter, 0, learning)
    more = num_groups(router)
    larger = router.config.resized(E + more).build(width_of(layer), E + more, router.capacity)
    for (name, parameter), other in zip(router.named_parameters(), larger.parameters(), strict=True):
        axis = axis_of_experts(name, parameter, other, E, E + more)
        # Entries past the experts, such as null experts, are as old as they are.
        past = 0 if axis is None else parameter.shape[axis] - E
        yield _PartOfExperts(parameter, axis, torch.cat((learning, torch.zeros(past, dtype=torch.bool))))


def _mask_gradient(parameter: Tensor, axis: int, learning: Tensor) -> None:
    """Let only the gradient of these rows along an axis through."""
    if not parameter.requires_grad:
        return
    shape = [-1 if i == axis else 1 for i in range(parameter.ndim)]
    mask = learning.to(parameter.device).reshape(shape)

    def only_learning(grad: Tensor) -> Tensor:
        return torch.where(mask.to(grad.device), grad, 0)

    parameter.register_hook(only_learning)


def _sources(loads_E: Tensor | Sequence[float] | None, E: int, n: int, groups: int) -> list[int]:
    """Return the old expert that each new one is a copy of: the most used of its group, then the next one."""
    if loads_E is None:
        raise ValueError("start='copy' needs loads_E, how often each expert was chosen")
    loads = [float(load) for load in loads_E]
    if len(loads) != E:
        raise ValueError(f"loads_E has {len(loads)} numbers for {E} experts")
    size, sources = E // groups, []
    for g in range(groups):
        by_load = sorted(range(g * size, (g + 1) * size), key=lambda e: -loads[e])
        sources += [by_load[i % size] for i in range(n // groups)]
    return sources


def _grown_router(
    router: Router, larger: Router, num_experts: int, kept: list[int]
) -> list[tuple[nn.Module, str, Tensor]]:
    """Return the tensors of the router that grow: the module and the name of each, and its larger value."""
    grown: list[tuple[nn.Module, str, Tensor]] = []
    for module, name, old, fresh, axis in tensors_of_experts(router, larger):
        # Past the experts there may be more, as null experts.
        places = [*kept, *range(num_experts, fresh.shape[axis])]
        value = fresh.detach().to(device=old.device, dtype=old.dtype)
        if module is router and name == "expert_bias":
            value = old.mean().expand(fresh.shape).clone()  # neither favored nor starved at first
        value = value.index_copy(axis, torch.tensor(places, device=old.device), old.detach())
        grown.append((module, name, like(value, old)))
    return grown


def _grow_stacked(
    experts: Experts,
    n: int,
    kept: list[int],
    new: tuple[int, ...],
    sources: list[int] | None,
    init: Callable[[Tensor], Any] | None,
) -> None:
    """Make every stacked tensor larger by n rows."""
    E = experts.num_experts
    fresh: list[dict[str, Tensor]] = []
    while sources is None and len(fresh) < n:
        drawn = copy.deepcopy(experts)
        for module in drawn.modules():
            reset: Any = getattr(module, "reset_parameters", None)
            if reset is not None:
                reset()
        if init is not None:
            drawn.init_each(init)
        fresh += [drawn.weights_of(e) for e in range(E)]
    rows = fresh[:n] if sources is None else [experts.weights_of(e) for e in sources]
    for path, module in list(experts.named_modules()):
        for name, old in (*module._parameters.items(), *module._buffers.items()):
            if old is None:
                continue
            whole = f"{path}.{name}".lstrip(".")
            value = old.new_empty(E + n, *old.shape[1:])
            value[torch.tensor(kept, device=old.device)] = old.detach()
            value[torch.tensor(new, device=old.device)] = torch.stack([row[whole] for row in rows]).to(old.dtype)
            setattr(module, name, like(value, old))
