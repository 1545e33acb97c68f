"""Dense transformers that cost what a sparse one does: the models a comparison trains beside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import core
from apps.nlp.config import TransformerConfig
from apps.training import Baseline, SparseModule
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


def dense_baselines(sparse: Any, widths: Mapping[str, SolvedWidth]) -> Mapping[str, Baseline]:
    """Dense twins of ``sparse``, a module of this app, with FFNs of ``widths`` in place of its experts."""
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
            found[name] = Baseline(_Dense(sparse, solved.width), f"{replaced}, {elsewhere} elsewhere")
    return found


@dataclass(frozen=True)
class _Dense:
    """Makes the dense twin of ``sparse``. A class and not a closure: it pickles into another process."""

    sparse: SparseModule
    width: int

    def __call__(self) -> SparseModule:
        return self.sparse.twin(moe=None, replaced_hidden_dim=self.width)
