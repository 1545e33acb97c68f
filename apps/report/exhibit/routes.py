"""The experts of an example's patches and words, and its gates, layer by layer, read from the entries of a tape."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from apps.report.exhibit.parts import Gates, LayerPart, Patches, Pieces
from apps.report.heatmaps import numbers
from apps.report.routed import MOST_EXPERTS, experts_of_token, layer_label


def words_by_layer(
    entries: Iterable[Any], words: Sequence[Sequence[str]], title: str, unit: str = "subwords"
) -> dict[str, tuple[Pieces, ...]]:
    """Return the experts of words by layer, in the order of the passes.

    A pass of another number of tokens is left out: few tokens enter its block, and have no places among the words.

    Args:
        entries: entries of a tape, of one sequence without padding.
        words: the pieces of each word; all pieces together are the sequence.
        title: what the words are.
        unit: what the pieces are called.
    """
    pieces = tuple(tuple(word) for word in words)
    kept = [entry for entry in entries if entry.routing.num_tokens == sum(map(len, pieces))]
    layers: dict[str, tuple[Pieces, ...]] = {}
    for name, entry in zip(layer_names([entry.name for entry in kept]), kept, strict=True):
        experts_TK = experts_of_token(entry.routing, MOST_EXPERTS).cpu().numpy()
        layers[name] = (Pieces(title, pieces, experts_TK, expert_names(entry.routing), unit),)
    return layers


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


def expert_names(routing: Any) -> tuple[str, ...]:
    """Return the names that a routing gives its E experts, else their numbers."""
    return tuple(getattr(routing, "expert_names", ())) or numbers(len(routing.tokens_per_expert_E))


def layer_names(names: Sequence[str]) -> list[str]:
    """Return a name in words for each entry of a tape, all different.

    Two layers of one block have the last part of their name beside it, and later passes of a layer their number.

    Example::

        layer_names(["blocks.0.mixing", "blocks.0.ffn", "blocks.1.ffn", "blocks.1.ffn"])
        # ["block 0 mixing", "block 0 ffn", "block 1", "block 1, pass 2"]
    """
    sharing = Counter(layer_label(name) for name in dict.fromkeys(names))
    seen: Counter[str] = Counter()
    labels = []
    for name in names:
        label = layer_label(name)
        label = f"{label} {name.rpartition('.')[2]}" if sharing[label] > 1 else label
        seen[label] += 1
        labels.append(label if seen[label] == 1 else f"{label}, pass {seen[label]}")
    return labels
