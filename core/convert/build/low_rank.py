"""Low-rank adapters (LoRA) of stacked experts, routers and linear layers, in place: ``core.add_adapters`` with a
``core.LoRA``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...experts import Experts, LoRA
from ...experts.adapters import CHILD, Adapters, LowRankUpdate, updates_of
from ...experts.base import local_tensor
from ...kernels import Linear
from ...layers.base import MoELayer
from ..read.names import matching_names

EXPERTS, ROUTER, ATTENTION = "experts", "router", "attention"
_OF_ATTENTION = ("attn", "attention")
_WEIGHT = "weight"


def put_adapters(model: nn.Module, lora: LoRA, modules: str | Sequence[str], name: str) -> None:
    """Freeze a model but for its adapters, and add one: see ``add_adapters``."""
    listed = [modules] if isinstance(modules, str) else list(modules)
    updates = []
    for owner, key, shape in _places(model, listed):
        if lora.rank > min(shape[-2:]):
            raise ValueError(f"rank={lora.rank} exceeds the smaller side of {key} of {shape[-2]}x{shape[-1]}")
        if lora.dropout and not _is_linear(owner):
            kind = type(owner).__name__
            raise ValueError(f"dropout={lora.dropout} is for linear layers: {kind} gets the tokens as they are")
        updates.append((owner, key, LowRankUpdate(shape, lora.rank, lora.scale, lora.dropout)))
    attach(model, updates, name)


def attach(model: nn.Module, updates: Sequence[tuple[nn.Module, str, LowRankUpdate]], name: str) -> None:
    """Add an adapter of these updates, each of a module of ``model`` and the key of a matrix of it, and freeze all
    else.

    Raises:
        ValueError: the name is empty, has a point or is taken, or experts are offloaded.
    """
    _check_in_memory(owner for owner, _, _ in updates)
    if not name or "." in name:
        raise ValueError(f"name={name!r}: an adapter's name has no point, and is not empty")
    if any(name in adapters for _, adapters in adapted_modules(model)):
        raise ValueError(f"the model has an adapter {name!r} already")
    if not any(True for _ in adapted_modules(model)):
        model.requires_grad_(False)
    for owner, key, update in updates:
        tensors = (t for module in (owner, model) for t in (*module.parameters(), *module.buffers()))
        like = next(t for t in tensors if t.is_floating_point())
        if CHILD not in owner._modules:
            owner.add_module(CHILD, Adapters())
            _hook(owner)
        dtype = torch.promote_types(like.dtype, torch.float32)  # half precision rounds small steps away
        owner.get_submodule(CHILD).put(name, key, update.to(like.device, dtype))  # type: ignore[operator]
    use_adapters(model, *dict.fromkeys((*_active(model), name)))


def use_adapters(model: nn.Module, *names: str) -> nn.Module:
    """Compute with these adapters, whose updates are added up; with none of them as before ``core.add_adapters``.

    Args:
        model: a model with low-rank adapters, changed in place.
        names: of ``add_adapters``.

    Raises:
        ValueError: the model has no adapter of a name.
    """
    known = dict.fromkeys(adapter for _, adapters in adapted_modules(model) for adapter in adapters)
    missing = next((name for name in names if name not in known), None)
    if missing is not None:
        raise ValueError(f"the model has no adapter {missing!r}; it has {', '.join(map(repr, known)) or 'none'}")
    for _, adapters in adapted_modules(model):
        adapters.active = names
    return model


@torch.no_grad()
def merge_low_rank(model: nn.Module) -> bool:
    """Add the active adapters to the weights and remove all adapters; return whether there were any."""
    places = [(path, model.get_submodule(path), adapters) for path, adapters in adapted_modules(model)]
    frozen = next((path for path, owner, _ in places if isinstance(owner, Experts) and owner.is_quantized), None)
    if frozen is not None:
        raise ValueError(f"{frozen!r} is quantized: adapters are merged into floating-point weights")
    _check_in_memory(owner for _, owner, _ in places)
    owners = Counter(id(p) for module in model.modules() for p in module._parameters.values())
    for _, owner, adapters in places:
        if isinstance(owner, Experts):
            for key in owner.adapter_shapes():
                for a, b, scale in updates_of(owner, key):
                    owner.add_to(key, scale * (a @ b))
        else:
            weight: Any = owner.weight
            updates = updates_of(owner, _WEIGHT)
            if updates and owners[id(weight)] > 1:  # the other modules compute without the updates
                owner.weight = weight = nn.Parameter(weight.clone(), requires_grad=False)
            for a, b, scale in updates:
                weight.add_(scale * (a @ b).t())
        for handle in adapters.__dict__.pop("hooks", ()):
            handle.remove()
        del owner._modules[CHILD]
    return bool(places)


def adapted_modules(model: nn.Module) -> Iterator[tuple[str, Adapters]]:
    """Yield the dotted name of each module that has low-rank adapters, and these."""
    for path, module in model.named_modules():
        adapters = module._modules.get(CHILD)
        if isinstance(adapters, Adapters):
            yield path, adapters


def _check_in_memory(owners: Iterable[nn.Module]) -> None:
    """Raise a ``ValueError`` if an owner of adapters is offloaded experts, whose slots would stay as they are."""
    for owner in owners:
        if isinstance(owner, Experts) and owner.cache is not None:
            kind = type(owner).__name__
            raise ValueError(f"{kind} are offloaded: adapters are added and merged before core.offload_experts")


def _active(model: nn.Module) -> tuple[str, ...]:
    return next((adapters.active for _, adapters in adapted_modules(model)), ())


def _places(model: nn.Module, modules: Sequence[str]) -> Iterator[tuple[nn.Module, str, tuple[int, ...]]]:
    """Yield each module that is adapted, the key of a matrix of it, and the matrix's shape, (..., in, out)."""
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for wanted in modules:
        found: list[tuple[nn.Module, str, tuple[int, ...]]] = []
        if wanted == EXPERTS:
            for experts in (m for m in model.modules() if isinstance(m, Experts)):
                shapes = experts.adapter_shapes()
                if not shapes:
                    raise ValueError(f"{type(experts).__name__} take no low-rank adapters: feed-forward experts do")
                found += [(experts, key, shape) for key, shape in shapes.items()]
        elif wanted == ROUTER:
            routers = [layer.router for layer in model.modules() if isinstance(layer, MoELayer)]
            owners = [m for router in routers for m in router.modules() if _is_gate(m)]
            found = [(m, _WEIGHT, tuple(m._parameters[_WEIGHT].shape[::-1])) for m in owners]  # type: ignore[union-attr]
        else:
            if wanted == ATTENTION:
                names = [n for n in linear if any(part in n.lower() for part in _OF_ATTENTION)]
            else:
                names = matching_names(model, wanted, list(linear), "linear layers", fnmatchcase)
            for name in names:
                if name not in linear:
                    kind = type(model.get_submodule(name)).__name__
                    raise ValueError(f"module {name!r} is a {kind}: low-rank adapters are for an nn.Linear")
                place_of(model, name)
                found.append((linear[name], _WEIGHT, (linear[name].in_features, linear[name].out_features)))
        if not found:
            raise ValueError(f"modules={wanted!r}: a {type(model).__name__} has none")
        yield from found


def _is_gate(module: nn.Module) -> bool:
    weight = module._parameters.get(_WEIGHT)
    return weight is not None and weight.ndim == 2


def place_of(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Return the parent of a module and its name there.

    Raises:
        ValueError: the parent reads the module instead of calling it.
    """
    path, _, child = name.rpartition(".")
    parent = model.get_submodule(path)
    if isinstance(parent, nn.MultiheadAttention):
        raise ValueError(
            f"module {name!r} is part of an nn.MultiheadAttention, which reads its weight and never calls it"
        )
    return parent, child


def _is_linear(owner: nn.Module) -> bool:
    return type(owner).forward in (nn.Linear.forward, Linear.forward)


def _hook(owner: nn.Module) -> None:
    """Let a linear layer add its updates. Other owners of a weight compute with it updated; experts read theirs."""
    if isinstance(owner, Experts):
        return
    if _is_linear(owner):
        hooks = [owner.register_forward_hook(_add_updates)]
    else:
        hooks = [
            owner.register_forward_pre_hook(_put_updated_weight),
            owner.register_forward_hook(_take_updated_weight, always_call=True),
        ]
    owner.get_submodule(CHILD).__dict__["hooks"] = hooks


def _add_updates(linear: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> Tensor:
    adapters: Any = linear.get_submodule(CHILD)
    for update in adapters.of(_WEIGHT):
        x = F.dropout(args[0], update.dropout, linear.training) if update.dropout else args[0]
        y = y + x @ local_tensor(update.a).to(x.dtype) * update.scale @ local_tensor(update.b).to(x.dtype)
    return y


def _put_updated_weight(router: Any, args: Any) -> None:
    updates = updates_of(router, _WEIGHT)
    if updates:  # an attribute of the module comes before its parameter
        update: Any = sum(scale * (a @ b).t() for a, b, scale in updates)
        router.__dict__[_WEIGHT] = router.weight + update.to(router.weight.dtype)


def _take_updated_weight(router: nn.Module, args: Any, out: Any) -> None:
    router.__dict__.pop(_WEIGHT, None)
