"""``adopt`` makes the MoE blocks of a transformers model layers of this engine, in place, and ``release`` undoes it."""

from __future__ import annotations

import functools
import inspect
from operator import attrgetter
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..contract import RoutingContext
from ..dispatch import LocalDispatcher
from ..experts.adapters import CHILD
from ..flops import register_formulas
from ..routing.balance.balance import Balance
from .layouts import ACTIVATIONS, LAYOUTS, Layout
from .parts import Adopted, AdoptedClamped, AdoptedExperts, AdoptedFFN, AdoptedMoE, AdoptedRouter, Call

_GROUPS = ("n_group", "num_group", "n_groups")
"""Names under which routers that choose groups of experts first have their number."""


def adopt(
    model: nn.Module,
    balance: Balance = Balance(load_balancing_loss=0.0, router_z_loss=0.0),
    bias_update_rate: float = 0.0,
) -> nn.Module:
    """Make every MoE block of a transformers model a ``core.MoE``, in place.

    Parameters, ``state_dict``, ``save_pretrained``, ``generate`` and optimizers stay as they are: no tensor is copied.
    A block routes as it did, its experts are computed by the engine's kernels, and ``core.record``, ``core.aux_loss``,
    ``core.diagnose`` and the other tools know its layers. A call of packed rows, which have no ``attention_mask``,
    may give ``valid_BS``: bool (B, S), False for padding.

    Args:
        model: a model with MoE blocks whose layouts are in ``core.adopted.LAYOUTS``.
        balance: weights of the balance losses. By default no loss is added: transformers adds its own if
            ``output_router_logits`` asks for it.
        bias_update_rate: step of ``core.update_expert_bias``, for routers with a bias on the scores (DeepSeek-V3
            trained with 0.001); 0: the biases stay as they are.

    Returns:
        ``model``.

    Raises:
        ValueError: the model has no block of a known layout, one is adopted already, or a block is not as its layout
            says. The model is left as it was.

    Example::

        model = core.adopt(AutoModelForCausalLM.from_pretrained(folder))
        with core.record(model) as tape:
            model(**batch)
    """
    blocks = {name: m for name, m in model.named_modules() if type(m).__name__ in LAYOUTS}
    already = next((name for name, m in model.named_modules() if isinstance(m, AdoptedMoE)), None)
    if already is not None:
        raise ValueError(f"block {already!r} is adopted already: core.release(model) gives it back")
    unknown = next((f"{name!r}, a {type(m).__name__}" for name, m in model.named_modules() if _looks_sparse(m)), None)
    if unknown is not None:
        raise ValueError(
            f"block {unknown}, has experts and no known layout: tell it with core.adopted.register_layout(class name, "
            "Layout(router=..., experts=..., ...))"
        )
    if not blocks:
        raise ValueError(f"a {type(model).__name__} has no MoE block of a known layout: {', '.join(sorted(LAYOUTS))}")
    classes = {name: _classes(name, block, LAYOUTS[type(block).__name__]) for name, block in blocks.items()}
    register_formulas()
    for name, block in blocks.items():
        _adopt_block(block, classes[name], balance, bias_update_rate)
    model.__dict__["_adopted_hooks"] = _watch_padding(model, blocks)
    return model


def is_sparse(model: nn.Module) -> bool:
    """Return whether a model has blocks that ``adopt`` takes, or rejects for a layout that is not known."""
    return any(type(m).__name__ in LAYOUTS or _looks_sparse(m) for m in model.modules())


def release(model: nn.Module) -> nn.Module:
    """Give every adopted block back, with the parameters that it has now, and return ``model``.

    Raises:
        ValueError: experts are quantized, or have adapters, which the block would leave out.
    """
    for name, module in model.named_modules():
        if isinstance(module, AdoptedExperts) and module.is_quantized:
            raise ValueError(f"the experts {name!r} are quantized, which a block of transformers cannot compute")
        if isinstance(module, AdoptedExperts | AdoptedRouter) and CHILD in module._modules:
            raise ValueError(f"{name!r} has adapters: core.merge_adapters merges them into the weights before")
    for hook in model.__dict__.pop("_adopted_hooks", []):
        hook.remove()
    for module in [m for m in model.modules() if isinstance(m, Adopted)]:
        for name in module.__dict__.pop("_added"):
            module.__dict__.pop(name, None)
        if isinstance(module, AdoptedMoE) and not module.layout.experts:
            del module._modules["experts"]
        module.__class__ = module.original  # type: ignore[assignment]
    return model


def _looks_sparse(module: nn.Module) -> bool:
    """Return whether a module has stacked experts and a router, and no known layout."""
    if type(module).__name__ in LAYOUTS:
        return False
    children = dict(module.named_children())
    return "experts" in children and bool({"gate", "router"} & set(children))


def _join(mixin: type, original: type, layout: Layout) -> type:
    """Return a class of ``original``'s name that is both."""
    own = {"original": original, "layout": layout, "__module__": original.__module__}
    return type(original.__name__, (mixin, original), own)


_joined: Any = functools.cache(_join)


def _classes(name: str, block: nn.Module, layout: Layout) -> tuple[Any, Any, Any]:
    """Return the classes that a block, its router and its experts change to, or describe the mismatch."""
    for path in filter(None, (layout.router, layout.experts, layout.bias)):
        try:
            attrgetter(path)(block)
        except AttributeError:
            if path != layout.bias:
                raise ValueError(f"block {name!r}, a {type(block).__name__}, has no {path!r}") from None
    router, experts = block.get_submodule(layout.router), block.get_submodule(layout.experts)
    holder = _holder(block, layout)
    for path in filter(None, (layout.up, layout.down, layout.gate, layout.up_bias, layout.down_bias)):
        try:
            attrgetter(path)(holder)
        except AttributeError:
            raise ValueError(f"the experts of block {name!r}, {type(experts).__name__}, have no {path!r}") from None
    if not layout.alpha:
        activation = _activation(block, layout)
        if activation not in ACTIVATIONS or (layout.clamp and ACTIVATIONS[activation] != "silu"):
            raise ValueError(f"the experts of block {name!r} have the activation {activation}, which no kernel has")
    mixin = AdoptedClamped if layout.clamp else AdoptedFFN
    return (
        _joined(AdoptedMoE, type(block), layout),
        _joined(AdoptedRouter, type(router), layout),
        _joined(mixin, type(experts) if layout.experts else nn.Module, layout),
    )


def _adopt_block(block: Any, classes: tuple[Any, Any, Any], balance: Balance, bias_update_rate: float) -> None:
    layout: Layout = classes[0].layout
    router, holder = block.get_submodule(layout.router), _holder(block, layout)
    experts: Any = block.get_submodule(layout.experts) if layout.experts else nn.Module().train(block.training)
    K: Any = getattr(router, layout.top_k, None) or getattr(block, layout.top_k, 1 if layout.way == "mask" else 2)
    is_counted = layout.flat or layout.way in ("mask", "gates")
    E = experts.num_experts if is_counted else attrgetter(layout.up)(holder).shape[0]
    options = _expert_options(block, layout)
    block.__class__, router.__class__, experts.__class__ = classes
    if not layout.experts:
        block._modules["experts"] = experts  # without parameters: it computes with the block's own
    call = Call(block)
    _add(experts, num_experts=E, call=call, storage={}, **options)
    groups = next((g for m in (router, block) for n in _GROUPS if isinstance(g := getattr(m, n, None), int)), 1)
    _add(router, num_experts=E, num_groups=groups, call=call, bias_update_rate=bias_update_rate, _read=None)
    _add(
        block,
        num_experts=E,
        pairs_per_token=float(K),
        balance=balance,
        load_balancing_weight=None,
        dispatcher=LocalDispatcher(),
        dim=None,
        expert_output_masking=0.0,
        output_bias=None,
        shared_gate=None,
        call=call,
        _tapes=(),
        _unrecorded=0,
    )
    if "shared_experts" not in block._modules:
        _add(block, shared_experts=None)


def _holder(block: nn.Module, layout: Layout) -> nn.Module:
    """Return the module from which paths of matrices and of the activation start: the first of several experts."""
    experts = block.get_submodule(layout.experts)
    return next(experts.children()) if layout.way in ("mask", "gates") else experts


def _activation(block: nn.Module, layout: Layout) -> str:
    """Return the name of the activation's class, or of the function."""
    activation = attrgetter(layout.activation)(_holder(block, layout))
    return type(activation).__name__ if isinstance(activation, nn.Module) else activation.__name__


def _expert_options(block: nn.Module, layout: Layout) -> dict[str, Any]:
    if not layout.clamp:
        return {"activation": ACTIVATIONS[_activation(block, layout)]}
    experts = block.get_submodule(layout.experts)
    alpha = getattr(experts, layout.alpha) if layout.alpha else 1.0
    return {"limit": getattr(experts, layout.clamp), "alpha": alpha, "shift": layout.shift}


def _add(module: nn.Module, **values: Any) -> None:
    """Set attributes that the module does not have yet, and note them for ``release``."""
    added = module.__dict__.setdefault("_added", set())
    for name, value in values.items():
        if name not in module.__dict__:
            added.add(name)
            module.__dict__[name] = value


def _watch_padding(model: nn.Module, blocks: dict[str, Any]) -> list[RemovableHandle]:
    """Put hooks on a model, and on each module in it that is given a mask, which tell the blocks inside what of a call
    is padding."""
    handles = []
    for name, module in model.named_modules():
        inside = {n: b for n, b in blocks.items() if n != name and f".{n}".startswith(f".{name}." if name else ".")}
        places = tuple(inspect.signature(module.forward).parameters)
        if inside and (module is model or "attention_mask" in places):
            before = functools.partial(_note_padding, inside, places)
            handles += [
                module.register_forward_pre_hook(before, with_kwargs=True),
                module.register_forward_hook(functools.partial(_forget_padding, inside), always_call=True),
            ]
    return handles


def _note_padding(
    blocks: dict[str, Any], places: tuple[str, ...], module: nn.Module, args: Any, kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """Tell blocks what of this call is padding, if no module around has; return the call without ``valid_BS``."""
    given = {**dict(zip(places, args, strict=False)), **kwargs}
    for name, block in blocks.items():
        is_second = "decoder_attention_mask" in places and "decoder" in name.split(".")
        mask = given.get("valid_BS")
        mask = given.get("decoder_attention_mask" if is_second else "attention_mask") if mask is None else mask
        if block.call.context is None and isinstance(mask, Tensor) and mask.ndim == 2:
            block.call.context = RoutingContext(valid_BS=mask.bool())
    return args, {name: value for name, value in kwargs.items() if name != "valid_BS"}


def _forget_padding(blocks: dict[str, Any], module: nn.Module, args: Any, out: Any) -> None:
    for block in blocks.values():
        block.call.context = None
