"""What a model is, derived from the model itself: sparse, dense-gated, dense, trees, linear."""

from __future__ import annotations

from typing import Any

import core
from apps.nets.depths import TokenGate

SPARSE, DENSE_GATED, DENSE = "sparse", "dense-gated", "dense"

MEANINGS = {
    SPARSE: "an example leaves experts out, which compute nothing for it",
    DENSE_GATED: "no expert is left out: gates weight what all compute, or merge them into one",
    DENSE: "no experts",
    "trees": "boosted decision trees",
    "linear": "a linear model",
}


def kind_of(model: Any) -> str:
    """Return what a model is, such as "sparse".

    Args:
        model: a module with its ``module``, the torch model, or an ``Estimator``, whose attribute ``kind`` says it.
    """
    module = getattr(model, "module", None)
    if module is None:
        return str(getattr(model, "kind", "no network"))
    layers = [layer for layer in core.moe_layers(module).values() if not isinstance(layer, TokenGate)]
    if not layers:
        return DENSE
    return SPARSE if any(_leaves_out(layer) for layer in layers) else DENSE_GATED


def _leaves_out(layer: core.MoELayer) -> bool:
    """Return whether a token, or a task of an example, takes fewer experts than there are."""
    if isinstance(layer, core.MergedMoE):
        return False  # its pair is the merged expert
    pairs = getattr(layer, "pairs_per_token", None)
    if pairs is not None and pairs < layer.experts.num_experts:
        return True
    return layer.active_expert_params() < layer.all_expert_params()
