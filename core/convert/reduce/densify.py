"""``densify`` makes a sparse model dense: one expert, made of all, replaces each MoE layer."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from ...adopted.shrink import set_counts
from ...experts import Experts
from ...experts.base import check_no_adapters
from ...fields import OneOf, check_values
from ...layers import MoE, MoELayer
from ..read.parts import check_all_here, like, replace_layers, value_of_layer, weighted_rows
from .merge import OneExpert, average_experts, joined

HOWS = ("average", "use", "most_used", "sum", "top_k", "svd")

Loads = Tensor | Sequence[float]


@torch.no_grad()
def densify(model: nn.Module, how: str = "average", loads: Mapping[str, Loads] | Loads | None = None) -> nn.Module:
    """Replace each MoE layer of a model by a dense layer of one expert, as wide as one of its experts.

    If all experts of a layer are equal and a token's gates sum to 1, "average", "use" and "most_used" leave its
    output as it is. Elsewhere the dense model is a start, to be trained on, as by distillation from the sparse one.
    Shared experts, their gate and the output's bias stay. An adopted block of transformers stays one, with one expert
    that every token takes: "average", "use", "most_used" and "sum" are for it.

    ===========  =======================================================================================================
    "average"    the mean of the experts' parameters
    "use"        their mean, weighted by ``loads``
    "most_used"  the expert of the largest load
    "sum"        the sum of their parameters (OneS, arXiv 2201.10890)
    "top_k"      of each expert the F / E hidden units with the largest product of the norms of their incoming and
                 outgoing weights, side by side; biases of the output are averaged (OneS's gathering of the top K)
    "svd"        the sum of each matrix's best approximations of rank ``min(D, F) / E``, one for each expert; biases
                 are averaged (OneS's gathering by singular values)
    ===========  =======================================================================================================

    Args:
        model: any module with MoE layers, changed in place, or one MoE layer.
        how: one of the above.
        loads: how often each expert was chosen, (E,), as ``ExpertStatistics.loads_E`` or
            ``Routing.chosen_per_expert_E``: by the name of the layer, or the loads of the one layer; for "use" and
            "most_used".

    Returns:
        ``model``, or the dense layer in the place of a layer.

    Raises:
        ValueError: there is no MoE layer, its experts cannot be merged so, have adapters or are split over ranks, or
            loads are missing, negative, all 0 or of another number.

    Example::

        core.densify(model, "use", {name: s.loads_E for name, s in core.expert_statistics(model, batches).items()})
    """
    check_values(Annotated[str, OneOf(*HOWS)], how=how)
    by_load = how in ("use", "most_used")
    if loads is not None and not by_load:
        raise ValueError(f"loads are for how='use' and how='most_used', not for {how!r}")

    def dense(name: str, layer: MoELayer) -> nn.Module:
        if not isinstance(layer, MoE):
            raise ValueError(f"layer {name!r} is a {type(layer).__name__}: core.MoE and its subclasses become dense")
        check_all_here(layer.experts, "a layer becomes dense")
        load_E = _loads(value_of_layer(loads, name, "loads"), layer.num_experts, name) if by_load else None
        if layer.is_adopted:
            change = layer.shrunk(1, weighted_rows(_weights(layer.num_experts, how, load_E)[None]))
            assert change is not None
            change()
            return layer
        return _dense_layer(layer, how, load_E)

    made = replace_layers(model, dense)
    set_counts(model)
    return made


def _weights(E: int, how: str, load_E: Tensor | None) -> Tensor:
    """Return the weights of the experts in the one that takes their place, (E,), where it is a sum of them."""
    if how in ("top_k", "svd"):
        raise ValueError(f"how={how!r} is for core.MoE: adopted blocks become dense by average, use, most_used or sum")
    if load_E is None:
        return torch.full((E,), 1.0 if how == "sum" else 1 / E, dtype=torch.float64)
    return load_E / load_E.sum() if how == "use" else torch.eye(E, dtype=torch.float64)[int(load_E.argmax())]


def _dense_layer(layer: MoE, how: str, load_E: Tensor | None) -> OneExpert:
    """Return the dense layer that takes the place of one layer."""
    E = layer.num_experts
    if how == "most_used":
        assert load_E is not None
        return OneExpert.in_place_of(layer, joined(layer.experts, [int(load_E.argmax())], torch.ones(1)))
    if how == "top_k":
        return OneExpert.in_place_of(layer, _largest_units(layer.experts))
    if how == "svd":
        merged = average_experts(layer).expert  # raises if they cannot be merged; matrices follow
        return OneExpert.in_place_of(layer, _low_ranks(layer.experts, merged))
    if how == "average":
        return average_experts(layer)
    return average_experts(layer, torch.ones(E) if load_E is None else load_E / load_E.sum())


def _loads(loads: Any, E: int, name: str) -> Tensor:
    """Return the loads of a layer as float64 (E,)."""
    load_E = torch.as_tensor(loads, dtype=torch.float64).cpu()
    if load_E.shape != (E,):
        raise ValueError(f"loads of layer {name!r} have shape {tuple(load_E.shape)} for {E} experts")
    if not bool(load_E.isfinite().all()) or float(load_E.min()) < 0 or float(load_E.sum()) == 0:
        raise ValueError(f"loads {load_E.tolist()} of layer {name!r} are not finite, not negative and not all 0")
    return load_E


def _largest_units(experts: Experts) -> Experts:
    """Return one expert of the largest hidden units of all, as many as one expert has."""
    axes, E = experts.hidden_axes, experts.num_experts
    check_no_adapters(experts)
    if not axes:
        raise ValueError(f"{type(experts).__name__} have no hidden units that stand side by side: not for how='top_k'")
    tensors = dict(experts.named_parameters())
    norms = {True: torch.zeros(()), False: torch.zeros(())}  # of outgoing weights, and of incoming ones
    for name, axis in axes.items():
        if name in tensors and tensors[name].ndim == 3:
            squares_EF = tensors[name].double().square().sum(3 - axis)
            norms[name in experts.linear_in] = norms[name in experts.linear_in].to(squares_EF) + squares_EF
    score_EF = norms[True] * norms[False]
    F = score_EF.shape[1]
    # The first experts give one unit more where E does not divide F.
    units = [row_F.topk(F // E + (e < F % E)).indices.sort().values for e, row_F in enumerate(score_EF)]
    one = copy.deepcopy(experts)
    for name, stacked in tensors.items():
        rows = stacked.detach()
        if name in axes:
            parts = [rows[e : e + 1].index_select(axes[name], index) for e, index in enumerate(units)]
            value = torch.cat(parts, axes[name])
        else:
            value = rows.mean(0, keepdim=True)
        setattr(one, name, like(value, stacked))
    one.num_experts = 1
    return one


def _low_ranks(experts: Experts, mean: Experts) -> Experts:
    """Put into ``mean``, one expert, the sums of low-rank approximations of all experts' matrices, and return it."""
    for stacked, one in zip(experts.parameters(), mean.parameters(), strict=True):
        if stacked.ndim != 3:
            continue
        wide = stacked.double() if stacked.dtype == torch.float64 else stacked.float()
        u, s, v = torch.linalg.svd(wide, full_matrices=False)
        rank = max(1, s.shape[1] // experts.num_experts)
        one.copy_((u[:, :, :rank] * s[:, None, :rank] @ v[:, :rank]).sum(0, keepdim=True))
    return mean
