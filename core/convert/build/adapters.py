"""``merge_adapters`` folds adapters into their linear layers, if all tokens get the same update."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from ...experts import Experts
from ...experts.low_rank import IA3Experts, LoRAExperts
from ...layers import AdaptedLinear, AveragedMoE, MoE
from ...routing.router import RouterConfig
from ..read.parts import check_all_here, replace_modules
from ..reduce.merge import OneExpert, average_experts, joined
from .low_rank import merge_low_rank


@torch.no_grad()
def merge_adapters(model: nn.Module) -> nn.Module:
    """Merge the adapters of a model into its weights: plain LoRA, or a mixture that is the same for every token.

    Each ``AdaptedLinear`` becomes one ``nn.Linear`` with its outputs in evaluation, by the name that it had before
    ``core.add_adapters``. This needs gates that are the same for every token: of one expert, or of ``Random`` in
    evaluation. Updates of a task's or domain's own are first taken out by ``core.cut_out``, and others may be averaged
    by ``core.densify``. The linear layers have copies of the weights, which are frozen as the base was, and a layer
    whose weight was tied to another module's has one of its own. Sums are taken in float32 at least.

    Args:
        model: any module with adapted layers, changed in place, or one ``AdaptedLinear``.

    Returns:
        ``model``, or the linear layer.

    Raises:
        ValueError: the model has no adapters; experts with LoRA are quantized; gates differ by token, or tokens may be
            dropped; the updates are neither ``LoRA`` nor ``IA3``; or an output's bias has no bias of the base to join.
            The model is left as it was.

    Example::

        core.merge_adapters(core.cut_out(adapted, task=0))
    """
    merged: dict[nn.Module, nn.Linear] = {}
    for name, module in model.named_modules():
        if isinstance(module, AdaptedLinear):
            try:
                merged[module] = _merged(module)
            except ValueError as error:
                of = f" of {name!r}" if name else ""
                raise ValueError(f"the adapters{of} cannot be merged: {error}") from None
    had_low_rank = merge_low_rank(model)
    if not merged and not had_low_rank:
        raise ValueError(f"a {type(model).__name__} without adapted layers has no adapters to merge")
    return replace_modules(model, merged)


def _merged(adapted: AdaptedLinear) -> nn.Linear:
    """Return the linear layer that computes the same as an adapted one."""
    one = _one_update(adapted.updates)
    if one.shared_gate is not None:
        raise ValueError("a shared_gate weights the adapters token by token")
    linear: nn.Linear = copy.deepcopy(adapted.base)
    parts = [part for part in (one.expert, one.shared_experts) if part is not None]
    for part in parts:
        check_all_here(part, "adapters are merged")
    wide = torch.float64 if linear.weight.dtype == torch.float64 else torch.float32
    if adapted.after:
        scale_D = torch.stack([_scale(part, wide) for part in parts]).sum(0)
        linear.weight.copy_(linear.weight.to(wide) * scale_D[:, None])
        if linear.bias is not None:
            linear.bias.copy_(linear.bias.to(wide) * scale_D)
    else:
        linear.weight.copy_(linear.weight.to(wide) + torch.stack([_update(part, wide) for part in parts]).sum(0))
    if one.output_bias is not None:
        if linear.bias is None:
            raise ValueError("output_bias is added to a layer without a bias")
        linear.bias.add_(one.output_bias)
    return linear


def _one_update(updates: nn.Module) -> OneExpert:
    """Return the adapters as one expert that every token takes."""
    if isinstance(updates, OneExpert):
        return updates
    if isinstance(updates, AveragedMoE):
        return average_experts(updates)
    assert isinstance(updates, MoE)
    config = getattr(updates.router, "config", None)
    gates = config.constant_gates(updates.num_experts) if isinstance(config, RouterConfig) else None
    if gates is None:
        source = config.source() if isinstance(config, RouterConfig) else type(updates.router).__name__
        raise ValueError(f"router {source} gives tokens gates of their own: densify makes one adapter of them first")
    if updates.router.capacity.ratio(training=False) is not None:
        raise ValueError("with a capacity tokens are dropped: set it to None before")
    return OneExpert.in_place_of(updates, joined(updates.experts, range(updates.num_experts), torch.tensor(gates)))


def _update(experts: Experts, dtype: torch.dtype) -> Tensor:
    """Return the sum of low-rank updates as a weight of ``nn.Linear``, (D_out, D)."""
    if not isinstance(experts, LoRAExperts):
        raise ValueError(f"{type(experts).__name__} are no part of a linear layer: LoRA and IA3 are")
    return experts.scale * torch.einsum("edr,erf->fd", experts.w_a.to(dtype), experts.w_b.to(dtype))


def _scale(experts: Experts, dtype: torch.dtype) -> Tensor:
    """Return the sum of the vectors that scale the output, (D_out,)."""
    if not isinstance(experts, IA3Experts):
        raise ValueError(f"{type(experts).__name__} are no part of a linear layer: LoRA and IA3 are")
    return experts.v.to(dtype).sum(0)
