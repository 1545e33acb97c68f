"""``offload_experts``: the experts of a model leave the device, and come back through a few slots."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from ..experts import Experts
from ..experts.mixed import MixedExperts
from ..fields import OneOf, check_values
from ..layers import MoELayer, NeuronMoE, SoftMoE, moe_layers
from ..routing.gates import LinearGate
from .offloaded import Offloaded, OffloadedExperts, stacked
from .prediction import Forecast, Scores
from .slots import POLICIES, SlotPool
from .stores import ExpertFile, FileStore, HostStore

GLANCED = 64
"""Tokens of a call, at most, that a prediction looks at."""


def offload_experts(
    model: nn.Module,
    budget_bytes: int,
    path: str | Path | None = None,
    policy: Literal["lfru", "lru"] = "lfru",
    prefetch: bool = True,
    device: torch.device | str | None = None,
) -> OffloadedExperts:
    """Keep the routed experts of a trained model off the device, in place, and fetch the ones that a call needs.

    Experts of equal shapes share a pool of slots, whatever their layers. Which expert gives way is the ``policy``'s
    choice, and while a layer computes the experts of the next one are predicted and fetched by a thread, on a stream of
    its own on CUDA. The output equals the resident model's; see ``OffloadedExperts``.

    The state dict stays complete, and a copy or pickle of the model is one with all experts in memory. ``model.to`` of
    another device moves the slots. Experts of layers in which every token takes all of them (dense gates, merged
    experts) stay as they are, and so do shared experts.

    Args:
        model: any module with MoE layers, in evaluation.
        budget_bytes: bytes of the slots: that much of the experts is on the device.
        path: a new safetensors file that keeps the experts; it has to stay as it is as long as the model is used. None:
            host memory, pinned if the device is a GPU.
        policy: "lfru": the expert of the fewest uses gives way, and a use counts less the longer it is ago; "lru": the
            one whose last use is longest ago.
        prefetch: whether experts are fetched ahead.
        device: device of the slots; None: the device of the experts.

    Returns:
        The counters of hits, misses and bytes. The model keeps it.

    Raises:
        ValueError: the model has no experts to offload, they are offloaded already or split over ranks, or the budget
            is below one expert of each shape; or an adopted block's, which are not stacked.
        OSError: the file cannot be written.

    Example::

        model = apps.load("runs/translation")
        offloaded = core.offload_experts(model, budget_bytes=64 * 2**20, path="/tmp/experts.safetensors")
        model.predict(["Guten Morgen"])
        offloaded.statistics.hit_rate
    """
    check_values(Annotated[str, OneOf(*POLICIES)], policy=policy)
    check_values(int, budget_bytes=budget_bytes)
    places, left = _places(model)
    for name, (experts, _) in places.items():
        if experts.cache is not None:
            raise ValueError(f"the experts {name} are offloaded already")
        if any(hasattr(t, "to_local") for t in (*experts.parameters(), *experts.buffers())):
            raise ValueError(f"the experts {name} are split over ranks: each rank holds few of them as it is")
    tensors = {name: stacked(experts) for name, (experts, _) in places.items()}
    if not places:
        raise ValueError(f"a {type(model).__name__} has no routed experts to offload")
    groups: dict[tuple[object, ...], list[str]] = {}
    for name, own in tensors.items():
        shape = tuple((key, t.shape[1:], t.dtype) for key, t in sorted(own.items()))
        groups.setdefault(shape, []).append(name)
    counts = _slots(groups, tensors, budget_bytes)
    here = next(iter(next(iter(tensors.values())).values())).device
    on = here if device is None else torch.empty(0, device=device).device
    file = None
    if path is not None:
        file = ExpertFile(Path(path), {f"{name}.{key}": t for name, own in tensors.items() for key, t in own.items()})
    members = []
    for name, (experts, gate) in places.items():  # one after the other: its own memory is free before the next is made
        own = tensors.pop(name)
        store = HostStore(own, on.type == "cuda") if file is None else FileStore(file, f"{name}.", [*own])
        for key, t in store.tensors.items():
            _replace(experts, key, t)
        members.append(Offloaded(name, experts, store, gate))
    numbers = {member.name: i for i, member in enumerate(members)}
    pools = []
    for names, count in zip(groups.values(), counts, strict=True):
        stores = {numbers[name]: members[numbers[name]].store for name in names}
        shapes = {key: (t.shape[1:], t.dtype) for key, t in stores[numbers[names[0]]].tensors.items()}
        pools.append(SlotPool(shapes, count, on, policy, stores))
        for name in names:
            members[numbers[name]].join(pools[-1])
    is_foreseen = prefetch and not any(isinstance(layer, NeuronMoE) for layer in moe_layers(model).values())
    forecast = Forecast([member.gate for member in members]) if is_foreseen else None
    return OffloadedExperts(members, pools, forecast, left)


def offloadable_bytes(model: nn.Module) -> int:
    """Return the bytes of the experts that ``offload_experts`` would offload; 0 where there are none."""
    return sum(t.nbytes for experts, _ in _places(model)[0].values() for t in stacked(experts).values())


@contextlib.contextmanager
def loading_experts(model: nn.Module, state: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Give experts that ``unloaded_experts`` has left without memory the values of a state dict.

    Experts that ``offload_experts`` would offload take the state's own tensors: if those are mapped from a file, the
    file has to stay as it is until the experts are offloaded, and no copy is made before. Others get copies. They have
    no gradients.

    Args:
        model: the model, of which nothing but experts is given values here.
        state: values by the names of the model's ``state_dict``.

    Yields:
        what ``model.load_state_dict`` is to be given inside the block: the state, without those values.

    Raises:
        ValueError: the state has no values for a tensor without memory, or values of another shape.

    Example::

        with core.offload.unloaded_experts():
            model = Net()
        state = torch.load("net.pt", mmap=True, weights_only=True)
        with core.offload.loading_experts(model, state) as rest:
            model.load_state_dict(rest)
        core.offload_experts(model.eval(), budget_bytes=64 * 2**20, path="/tmp/experts.safetensors")
    """
    empty = {
        f"{path}.{name}".lstrip("."): t
        for path, experts in model.named_modules(remove_duplicate=False)
        if isinstance(experts, Experts)
        for name, t in (*experts.named_parameters(), *experts.named_buffers())
        if t.is_meta
    }
    if not empty:
        yield state
        return
    taken = {name: t for name, t in empty.items() if name in state and state[name].shape == t.shape}
    rest: Any = copy.copy(state)
    rest.update(taken)  # a tensor without memory is "copied" to itself
    yield rest
    moving = {id(t) for experts, _ in _places(model)[0].values() for t in stacked(experts).values()}
    for name, t in empty.items():
        if name not in taken:
            raise ValueError(f"{name} of shape {tuple(t.shape)} has no memory, and the state has no such values for it")
        values = state[name].detach().to(t.dtype)
        _replace(model, name, values if id(t) in moving else values.clone())


def _places(model: nn.Module) -> tuple[dict[str, tuple[Experts, Scores | None]], list[str]]:
    """Return the modules of experts to be offloaded with their gates, by name, and the names of those left."""
    places: dict[str, tuple[Experts, Scores | None]] = {}
    left, known = [], set()
    for path, layer in moe_layers(model).items():
        name = f"{path}.experts".lstrip(".")
        if not (layer.splits_experts or isinstance(layer, (NeuronMoE, SoftMoE))):
            left.append(name)
            continue
        if id(layer.experts) in known:
            continue  # layers may share their experts
        known.add(id(layer.experts))
        first = 0
        parts = layer.experts.parts if isinstance(layer.experts, MixedExperts) else [layer.experts]
        for i, part in enumerate(parts):
            assert isinstance(part, Experts)
            if not part.is_stacked:
                kind = type(layer).__name__
                raise ValueError(f"the experts {name} of a {kind} have no first axis that counts them: not offloaded")
            if stacked(part):
                whole = part is layer.experts
                places[name if whole else f"{name}.parts.{i}"] = part, _scores(layer, first, part.num_experts)
            first += part.num_experts
    return places, left


def _scores(layer: MoELayer, first: int, count: int) -> Scores | None:
    """Return the scores of ``count`` experts from ``first`` on by the layer's linear gate; None if it has none."""
    gate = getattr(layer.router, "gate", None)
    if not isinstance(gate, LinearGate) or gate.weight.shape[0] < first + count:
        return None

    def scores(x_TD: Tensor) -> list[float] | None:
        T, D = x_TD.shape
        if gate.weight.shape[1] != D:
            return None  # rows of something else, such as attended values
        some_TD = x_TD if T <= GLANCED else x_TD[:: -(-T // GLANCED)]
        share_E = gate(some_TD.to(gate.weight.dtype)).softmax(-1).mean(0)
        shares: list[float] = share_E[first : first + count].tolist()
        return shares if math.isfinite(sum(shares)) else None  # padding may hold NaN

    return scores


def _slots(
    groups: Mapping[tuple[object, ...], list[str]], tensors: Mapping[str, Mapping[str, Tensor]], budget: int
) -> list[int]:
    """Return the number of slots of each group of modules of equal shapes, in proportion to the bytes of its experts.

    Raises:
        ValueError: the budget is below one expert of each.
    """
    totals = [sum(t.nbytes for name in names for t in tensors[name].values()) for names in groups.values()]
    experts = [sum(len(next(iter(tensors[name].values()))) for name in names) for names in groups.values()]
    sizes = [total // count for total, count in zip(totals, experts, strict=True)]
    if budget < sum(sizes):
        what = "one expert" if len(sizes) == 1 else f"one expert of each of {len(sizes)} shapes"
        raise ValueError(f"budget_bytes={budget} is below the {sum(sizes)} bytes of {what}")
    spare = budget - sum(sizes)  # one slot each, and the rest by their sizes
    return [
        min(count, 1 + int(spare * total / sum(totals)) // size)
        for count, total, size in zip(experts, totals, sizes, strict=True)
    ]


def _replace(model: nn.Module, name: str, t: Tensor) -> None:
    """Put a tensor in the place of another, without a gradient."""
    path, _, last = name.rpartition(".")
    module = model.get_submodule(path)
    if last in module._parameters:
        module._parameters[last] = nn.Parameter(t, requires_grad=False)
    else:
        module._buffers[last] = t
