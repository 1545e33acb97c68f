"""The experts of words, layer by layer, read from the entries of a tape."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from apps.report.exhibit.parts import Pieces
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
