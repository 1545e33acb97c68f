"""Dense transformers that cost what a sparse one does: the models a comparison trains beside it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import core
from apps.equal_cost.comparable import Baseline
from apps.equal_cost.twins import DenseTwin, dense_baselines
from apps.equal_cost.widths import SolvedWidth, ffn_widths
from apps.nets.config import TransformerConfig


def baseline_widths(
    moe: core.MoEConfig, transformer: TransformerConfig, tolerance: float = 0.05
) -> dict[str, SolvedWidth]:
    """FFN hidden dims of dense layers that cost what ``moe`` does, router included.

    Args:
        moe: the sparse layer.
        transformer: says what its dense FFNs are.
        tolerance: relative difference beyond which a width does not count as equal.

    Returns:
        "dense_equal_flops" and "dense_equal_params".
    """
    dim = transformer.shape.dim
    flops, params = moe.flops_per_token(dim), moe.num_params(dim)
    return ffn_widths("dense", dim, flops, params, tolerance, gated=transformer.gated, bias=transformer.bias)


def dense_twins(sparse: Any) -> Mapping[str, Baseline]:
    """Dense models of equal active FLOPs and of equal parameters as ``sparse``, a module of this app; only the FFNs in
    place of experts are wider."""
    if sparse.moe is None:
        return {}
    if sparse.pretrained is not None:
        note = f"the weights of pretrained={sparse.pretrained} are of the sparse model alone"
        return {name: Baseline(None, note) for name in ("dense_equal_flops", "dense_equal_params")}
    widths = baseline_widths(sparse.moe, sparse.transformer)
    says = "FFN hidden dim {width} in the replaced layers"
    return dense_baselines(widths, partial(DenseTwin, sparse), says, sparse.transformer.shape.hidden_dim)
