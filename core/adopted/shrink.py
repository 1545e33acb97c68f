"""Adopted blocks with fewer experts: their tensors, their counts, and the model's configuration."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from ..experts.adapters import CHILD

Rows = Callable[[Tensor], Tensor]
"""Takes a tensor whose first axis counts the experts to one with the new rows."""
COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
"""Names under which modules and configurations of transformers have the number of routed experts."""
TOP_KS = ("num_experts_per_tok", "moe_top_k", "moe_topk", "moe_k", "top_k")


def shrinking(layer: Any, num_experts: int, rows: Rows) -> Callable[[], None]:
    """Check that an adopted block can have other experts, made of those that it has, and return what does it.

    Args:
        layer: the block.
        num_experts: their number.
        rows: makes each stacked tensor of theirs, and the router's rows.

    Raises:
        ValueError: a token takes more experts than would be left, but for one expert, which every token takes if the
            router can choose one; its groups would be unequal, or have fewer than it scores them by; the router's
            tensors have no row for each expert, or it has a table of token ids; the experts are offloaded or have
            adapters; Jamba with one; or JetMoE, whose attention has as many experts.
    """
    E, K, kind = layer.num_experts, int(layer.pairs_per_token), type(layer).__name__
    router, fewest = layer.router, layer.layout.min_experts
    if layer.experts.cache is not None:
        raise ValueError(f"{type(layer.experts).__name__} are offloaded: a layer shrinks before core.offload_experts")
    if num_experts < K and (num_experts != 1 or not layer.can_take_fewer):
        raise ValueError(f"a token takes {K} experts, and {num_experts} would be left")
    if num_experts < fewest:
        raise ValueError(f"a saved {kind} has at least {fewest} experts, and {num_experts} would be left")
    # DeepSeek-V2, which alone has several methods, scores a group by its best expert.
    best = 2 if hasattr(router, "num_group") and not hasattr(router, "topk_method") else 1
    if num_experts < (needed := router.num_groups * best):
        raise ValueError(f"the groups of {kind}'s router need {needed} experts, and {num_experts} would be left")
    if num_experts % router.num_groups:
        raise ValueError(f"num_experts={num_experts} is not a multiple of the {router.num_groups} groups of experts")
    if any(CHILD in module._modules for module in layer.modules()):
        raise ValueError(f"{kind} has adapters: core.merge_adapters merges them before")
    table = getattr(router, "tid2eid", None)  # of DeepSeek-V4's first layers
    if table is not None and table.any():
        raise ValueError(f"the router of {kind} has a table of the experts of each token id: all of them stay")
    if layer.layout.way == "sorted":
        raise ValueError(f"{kind}: its configuration has one number for these experts and for those of attention")
    seats = list(_seats(layer, E))
    if not any(name == "weight" for _, name, _ in seats):
        raise ValueError(f"the router of {kind} has no row for each of the {E} experts")

    def carry_out() -> None:
        _restack(layer.experts, num_experts, rows)
        for module, name, axis in seats:
            _set(module, name, rows(getattr(module, name).detach().movedim(axis, 0)).movedim(0, axis).contiguous())
        for module in layer.modules():
            for name in COUNTS:
                if module.__dict__.get(name) == E:
                    module.__dict__[name] = num_experts
        if num_experts == 1:
            set_top_k(layer, 1)

    return carry_out


def set_top_k(layer: Any, top_k: int) -> None:
    """Let each token of an adopted block take ``top_k`` experts, where the block or its router has their number."""
    for module in layer.modules():
        for name in TOP_KS:
            if isinstance(module.__dict__.get(name), int):
                module.__dict__[name] = top_k
    layer.__dict__["pairs_per_token"] = float(top_k)


def set_counts(model: nn.Module) -> None:
    """Write the number of experts of adopted blocks to the model's configuration, which a saved folder has. A model
    without such blocks, or with other numbers in each, stays as it is.

    Raises:
        ValueError: the configuration has no number of experts.
    """
    counts = {layer.num_experts for layer in model.modules() if getattr(layer, "is_adopted", False)}
    if len(counts) != 1 or getattr(model, "is_adopted", False):  # a block by itself has no configuration
        return
    num_experts, config = counts.pop(), getattr(model, "config", None)
    text = getattr(config, "get_text_config", lambda: config)()
    places = [own for own in (text, getattr(text, "ffn_config", None)) if own is not None]
    found = [(own, name) for own in places for name in COUNTS if isinstance(getattr(own, name, None), int)]
    if not found:
        raise ValueError(f"the configuration of {type(model).__name__} has no number of experts")
    for own, name in found:
        setattr(own, name, num_experts)
    for own in places:
        for name in TOP_KS:
            if num_experts == 1 and isinstance(getattr(own, name, None), int):
                setattr(own, name, 1)


def _seats(layer: Any, E: int) -> Iterator[tuple[nn.Module, str, int]]:
    """Yield the tensors of the router and of the block itself with an axis for the experts, and that axis."""
    for module in (*layer.router.modules(), layer):
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and E in tensor.shape and not (module is layer and name == "bias"):
                yield module, name, tensor.shape.index(E)


def _restack(experts: Any, num_experts: int, rows: Rows) -> None:
    layout = experts.layout
    if experts.one_each():
        paths = [name for name, _ in experts.one_each()[0].named_parameters()]
        stacked = {path: rows(experts.stacked(path).detach()) for path in paths}
        for name in [n for n in experts._modules if n.startswith("expert_")][num_experts:]:
            del experts._modules[name]
        experts.storage.clear()
        for e, expert in enumerate(experts.one_each()):
            for path in paths:
                parent, _, leaf = path.rpartition(".")
                _set(expert.get_submodule(parent), leaf, stacked[path][e].clone())
        experts.__dict__["num_experts"] = num_experts
        return
    owner = experts if layout.experts else experts.call.block
    for path in filter(None, (layout.up, layout.gate, layout.down, layout.up_bias, layout.down_bias)):
        parent, _, leaf = path.rpartition(".")
        value = rows(experts.stacked(path).detach())
        _set(owner.get_submodule(parent), leaf, value.flatten(0, 1) if layout.flat else value)
    experts.__dict__["num_experts"] = num_experts


def _set(module: nn.Module, name: str, value: Tensor) -> None:
    old = getattr(module, name)
    is_parameter = isinstance(old, nn.Parameter)
    setattr(module, name, nn.Parameter(value, requires_grad=old.requires_grad) if is_parameter else value)
