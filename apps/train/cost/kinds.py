"""The kind of a network, derived from its layers: sparse, dense-gated or dense."""

from __future__ import annotations

from torch import nn

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
"""What a model is, by its kind; the last ones are estimators, which say theirs by themselves."""


def kind_of_network(network: nn.Module) -> str:
    """Return the kind of a network: a key of ``MEANINGS``."""
    layers = [layer for layer in core.moe_layers(network).values() if not isinstance(layer, TokenGate)]
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
