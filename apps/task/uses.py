"""The names of a tape's tokens (patches of an image, words, tasks' gates), as pages and reports show them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from apps.report.exhibit.parts import Gates, LayerPart, Patches
from apps.report.exhibit.routes import expert_names, layer_names, words_by_layer
from apps.report.routed import MOST_EXPERTS

__all__ = ["MOST_EXPERTS", "gates_by_layer", "patches_by_layer", "words_by_layer"]


def patches_by_layer(placed: Iterable[tuple[Any, Any]], image: np.ndarray) -> dict[str, tuple[LayerPart, ...]]:
    """Return the experts of an image's patches by layer, in the order of the passes.

    Args:
        placed: entries of a tape, each with the experts of its patches, (1, H, W, K); None where its tokens have no
            places in the image.
        image: the image as the model sees it.
    """
    kept = [(entry, ids_1HWK) for entry, ids_1HWK in placed if ids_1HWK is not None]
    names = layer_names([entry.name for entry, _ in kept])
    return {
        name: (Patches(image, ids_1HWK[0].cpu().numpy(), expert_names(entry.routing)),)
        for name, (entry, ids_1HWK) in zip(names, kept, strict=True)
    }


def gates_by_layer(
    gates: Iterable[tuple[str, str, Sequence[str], np.ndarray]], title: str
) -> Mapping[str, tuple[LayerPart, ...]]:
    """Return the weights of gates by layer, an expert a column, NaN where a gate does not reach one.

    Args:
        gates: the layer of each gate, its name, the names of its experts, and its weight for each, (E,).
        title: what the weights are.
    """
    by_layer: dict[str, list[tuple[str, Sequence[str], np.ndarray]]] = {}
    for layer, *gate in gates:
        by_layer.setdefault(layer, []).append(tuple(gate))  # type: ignore[arg-type]
    joined: dict[str, tuple[LayerPart, ...]] = {}
    for layer, own in by_layer.items():
        experts = tuple(dict.fromkeys(expert for _, names, _ in own for expert in names))
        weights = np.full((len(own), len(experts)), math.nan)
        for row, (_, names, weight_E) in zip(weights, own, strict=True):
            row[[experts.index(expert) for expert in names]] = weight_E
        joined[layer] = (Gates(title, tuple(name for name, *_ in own), experts, weights),)
    return joined
