"""Parts of a layer that conversions read and replace: its router, its experts, and the axis that counts the experts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...experts import Experts
from ...layers import MoE, MoELayer, moe_layers
from ...routing.router import Router, RouterConfig


def parts_of(layer: nn.Module, verb: str) -> tuple[Any, Experts]:
    """Return the router and the experts of a layer whose experts may become more or fewer.

    Args:
        layer: ``MoE`` or a subclass, whose router a ``RouterConfig`` has built.
        verb: "grow" or "shrink", for the messages.

    Raises:
        ValueError: the number of experts of this layer is fixed; the message says why.
    """
    if not isinstance(layer, MoE):
        raise ValueError(f"a {type(layer).__name__} does not {verb}: core.MoE and its subclasses do")
    router, experts = layer.router, layer.experts
    if experts.cache is not None:
        raise ValueError(f"{type(experts).__name__} are offloaded: a layer {verb}s before core.offload_experts")
    if layer.is_adopted:
        if verb == "grow":
            raise ValueError(f"an adopted {type(layer).__name__} does not grow")
        check_all_here(experts, f"a layer {verb}s")
        return router, experts
    config = getattr(router, "config", None)
    if not isinstance(router, Router) or not isinstance(config, RouterConfig):
        name = type(router).__name__
        raise ValueError(f"router {name} cannot {verb}: it has no RouterConfig to be built from again")
    if not (config.can_grow if verb == "grow" else config.can_shrink):
        raise ValueError(f"router {config.source()} cannot {verb}: no row of a gate stands for each expert alone")
    if any(isinstance(m, Experts) and m is not experts for m in experts.modules()):
        raise ValueError(f"{type(experts).__name__} of several kinds cannot {verb}: their counts are fixed")
    check_all_here(experts, f"a layer {verb}s")
    return router, experts


def check_all_here(experts: Experts, what: str) -> None:
    """Raise a ``ValueError`` if some of the experts are on other ranks, or are quantized; ``what`` starts the rule."""
    if any(isinstance(m, Experts) and m.is_quantized for m in experts.modules()):
        raise ValueError(f"{type(experts).__name__} are quantized: {what} before core.quantize_experts")
    if experts.num_local_experts != experts.num_experts:
        here = f"{experts.num_local_experts} of {experts.num_experts}"
        raise ValueError(f"{here} experts are here: {what} before it is split over ranks")


def layers_with_experts(model: nn.Module) -> dict[str, MoELayer]:
    """Return the MoE layers of a model that own experts, by dotted name; "" is the model itself.

    Raises:
        ValueError: there is none, or two layers share their experts, which would be converted twice.
    """
    every = moe_layers(model)
    layers = {name: layer for name, layer in every.items() if isinstance(getattr(layer, "experts", None), Experts)}
    if not layers:
        raise ValueError(f"a {type(model).__name__} without MoE layers has no experts")
    owners: dict[Experts, str] = {}
    for name, layer in layers.items():
        if layer.experts in owners:
            raise ValueError(f"layers {owners[layer.experts]!r} and {name!r} share their experts")
        owners[layer.experts] = name
    return layers


def replace_layers(model: nn.Module, make: Callable[[str, MoELayer], nn.Module]) -> nn.Module:
    """Put another module in the place of each MoE layer of a model.

    All are made before the first is put in, so that an error leaves the model as it was.

    Args:
        model: any module with MoE layers, changed in place, or one MoE layer.
        make: takes the name of a layer and the layer, and returns the module for its place.

    Returns:
        ``model``, or the new module where ``model`` is the layer.
    """
    made: dict[nn.Module, nn.Module] = {}
    for name, layer in layers_with_experts(model).items():
        made[layer] = make(name, layer)
    return replace_modules(model, made)


def replace_modules(model: nn.Module, made: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """Replace the modules named by the keys of ``made``, and return ``model``, or its replacement."""
    if model in made:
        return made[model]
    for parent in list(model.modules()):
        for child, module in parent._modules.items():
            if module is not None and module in made:
                setattr(parent, child, made[module])
    return model


def value_of_layer(values: Any, name: str, noun: str) -> Any:
    """Return the value of one layer: an entry of a mapping by name, or the only value, of a layer by itself.

    Raises:
        ValueError: the values are missing, or the mapping lacks the layer.
    """
    if values is None or (not isinstance(values, Mapping) and name):
        raise ValueError(f"{noun} are needed, by the name of each layer, such as {name!r}")
    if not isinstance(values, Mapping):
        return values
    if name not in values:
        raise ValueError(f"{noun} have no layer {name!r}; they have {', '.join(map(repr, values)) or 'none'}")
    return values[name]


def width_of(layer: MoE) -> int:
    """Return the width of the router's input, or raise a ``ValueError`` if the layer does not know it."""
    if layer.row_dim is None:
        raise ValueError("dim=None: a layer grows where its width is known, as that of MoEConfig.build")
    return layer.row_dim


def num_groups(router: Any) -> int:
    """Return into how many equal groups a router cuts the experts."""
    names = ("num_groups", "num_prototypes", "num_members")
    config = router if router.config is None else router.config  # an adopted one has none
    return next((getattr(config, name) for name in names if hasattr(config, name)), 1)


def reseated(router: Any, other: Any, rows: Callable[[Tensor], Tensor]) -> list[tuple[nn.Module, str, Tensor]]:
    """Return the tensors of a router with other rows for its experts: the module and the name of each, and its value.

    Args:
        router: for E experts.
        other: a router of the same config for another number of experts, which shows where the rows are.
        rows: takes a tensor whose first axis counts the E experts to one with the new rows.

    Raises:
        ValueError: as ``axis_of_experts``.
    """
    E = router.num_experts
    values: list[tuple[nn.Module, str, Tensor]] = []
    for module, name, old, _, axis in tensors_of_experts(router, other):
        first = old.detach().movedim(axis, 0)
        # Past the experts there may be more, as null experts.
        value = torch.cat((rows(first[:E]), first[E:])).movedim(0, axis).contiguous()
        values.append((module, name, like(value, old)))
    return values


def tensors_of_experts(router: Any, other: Any) -> Iterator[tuple[nn.Module, str, Tensor, Tensor, int]]:
    """Yield the tensors of a router that have a row for each expert: the module and the name of each, its value, the
    value in ``other``, a router of the same config for another number of experts, and the axis that counts the experts.

    Raises:
        ValueError: as ``axis_of_experts``.
    """
    modules = dict(router.named_modules())
    for path, module in other.named_modules():
        for name, new in (*module._parameters.items(), *module._buffers.items()):
            old = getattr(modules[path], name)
            if old is None or new is None:
                continue
            axis = axis_of_experts(f"{path}.{name}".lstrip("."), old, new, router.num_experts, other.num_experts)
            if axis is not None:
                yield modules[path], name, old, new, axis


def axis_of_experts(name: str, old: Tensor, new: Tensor, E: int, new_E: int) -> int | None:
    """Return the axis of a router's tensor that counts the experts; None if there is none.

    Args:
        name: name of the tensor, for the message.
        old, new: the tensor with E experts, and the same one of a router that is built for ``new_E``.

    Raises:
        ValueError: the two differ by something else than a row for each expert.
    """
    if old.shape == new.shape:
        return None
    unlike = [i for i, (a, b) in enumerate(zip(old.shape, new.shape, strict=True)) if a != b]
    axis = unlike[0]
    if len(unlike) > 1 or new.shape[axis] - old.shape[axis] != new_E - E or old.shape[axis] < E:
        verb = "grow" if new_E > E else "shrink"
        each = "new" if new_E > E else "lost"
        raise ValueError(
            f"the router's {name} would {verb} from {tuple(old.shape)} to {tuple(new.shape)}, by more than a row for "
            f"each {each} expert: an option that follows from E by default has to be given"
        )
    return axis


def like(value: Tensor, old: Tensor) -> Tensor:
    """Return a tensor as a parameter if ``old`` is one, which trains if ``old`` does."""
    return nn.Parameter(value, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else value


def restack(experts: Experts, num_experts: int, rows: Callable[[Tensor], Tensor]) -> Experts:
    """Replace every stacked tensor of some experts, in place, and return the experts.

    Args:
        experts: of one kind.
        num_experts: n, their new number.
        rows: takes a stacked tensor (E, ...) and returns (n, ...).
    """
    for module in experts.modules():
        for name, stacked in (*module._parameters.items(), *module._buffers.items()):
            if stacked is not None:
                setattr(module, name, like(rows(stacked.detach()), stacked))
    experts.num_experts = num_experts
    return experts


def set_num_experts(layer: MoE, num_experts: int) -> None:
    """Set the number of experts wherever a layer keeps it."""
    router: Any = layer.router
    for module in router.modules():
        if hasattr(module, "num_experts"):
            module.num_experts = num_experts
    layer.experts.num_experts = layer.num_experts = num_experts
    router.config = router.config.resized(num_experts)
    layer.pairs_per_token = router.config.pairs_per_token(num_experts)


def weighted_rows(weights_nE: Tensor) -> Callable[[Tensor], Tensor]:
    """Return a function that takes a stacked tensor (E, ...) to its weighted sums (n, ...), in its own dtype."""

    def rows(stacked: Tensor) -> Tensor:
        dtype = torch.float64 if stacked.dtype == torch.float64 else torch.float32
        weights = weights_nE.to(stacked.device, dtype)
        summed = weights @ stacked.to(dtype).reshape(len(stacked), -1)  # a vector has no second axis
        return summed.reshape(-1, *stacked.shape[1:]).to(stacked.dtype)

    return rows
