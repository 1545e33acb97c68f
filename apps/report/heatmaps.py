"""Counts as shares, and as maps of which expert takes the tokens of a class, a language or a value."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from apps.report.page.charts import HeatmapChart


def numbers(count: int) -> tuple[str, ...]:
    """Return "0", "1", ...: the names of columns without names."""
    return tuple(map(str, range(count)))


def row_names(names: Sequence[str], shares_of_all: Iterable[float]) -> tuple[str, ...]:
    """Return the names of a map's rows: each name with its share, and "all" for the last row."""
    percent = ("<1 %" if share < 0.005 else f"{100 * share:.0f} %" for share in shares_of_all)
    return (*(f"{name} ({text})" for name, text in zip(names, percent, strict=True)), "all")


def maps_by_label(
    counts: Mapping[str, np.ndarray], names: Sequence[str], title: str, row_title: str, most_rows: int = 40
) -> list[HeatmapChart]:
    """Return a map for each layer: the share of each label's tokens, and of all tokens, that each expert takes.

    A label without a token has no row. The names of the rows show each label's share of all tokens.

    Args:
        counts: layer name to (labels, E) tokens.
        names: names of the labels.
        title: what the maps show; each has the layer's name too.
        row_title: what a label is.
        most_rows: with more labels only those with the highest peaks have a row.
    """
    size_C = np.sum([counts_CE.sum(1) for counts_CE in counts.values()], axis=0)
    kept = np.flatnonzero(size_C)
    if len(kept) > most_rows:
        title += f": the most specialised of {len(names)}"
        peak_C = np.max([np.nan_to_num(shares(counts_CE)).max(1) for counts_CE in counts.values()], axis=0)
        kept = kept[np.sort(np.argsort(-peak_C[kept], kind="stable")[:most_rows])]
    rows = row_names([names[c] for c in kept.tolist()], size_C[kept] / max(size_C.sum(), 1))
    return [
        HeatmapChart.of(
            shares(np.concatenate([c[kept], c.sum(0, keepdims=True)])),
            rows,
            title=f"{title}, {layer}",
            row_title=row_title,
            value_title=f"share of the {row_title}'s tokens, %",
        )
        for layer, c in counts.items()
    ]


def shares(counts: np.ndarray) -> np.ndarray:
    """Return counts as shares of their row; NaN in a row without any."""
    sums = counts.sum(1, keepdims=True)
    return np.where(sums > 0, counts / np.maximum(sums, 1), np.nan)
