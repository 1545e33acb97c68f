"""Dense transformers that cost what a sparse one does: the models a comparison trains beside it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import core
from apps.nlp.config import TransformerConfig
from apps.training import Baseline
from apps.widths import SolvedWidth, ffn_widths, same_width


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


def dense_baselines(sparse: Any, widths: Mapping[str, SolvedWidth], build: Any) -> Mapping[str, Baseline]:
    """Dense models of ``widths``; ``build(sparse, width)`` makes one when it is called."""
    found: dict[str, Baseline] = {}
    for name, solved in widths.items():
        twin = next((n for n, b in found.items() if b.build and same_width(solved.width, widths[n].width)), None)
        replaced = f"FFN hidden dim {solved.width} in the replaced layers"
        if solved.problem:
            found[name] = Baseline(None, solved.problem)
        elif twin is not None:
            found[name] = Baseline(None, f"coincides with {twin}: {replaced}, there {widths[twin].width}")
        else:
            elsewhere = sparse.transformer.shape.hidden_dim
            found[name] = Baseline(build(sparse, solved.width), f"{replaced}, {elsewhere} elsewhere")
    return found
