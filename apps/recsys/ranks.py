"""Ranks of a test's items by group, such as by their popularity, as a report writes and shows them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from apps.report.page import BarChart, Part, Table
from apps.report.tables import write_csv
from apps.report.use import quarters

POPULARITY = ("most popular", "2nd quarter", "3rd quarter", "least popular", "not in training")
"""The groups of items: quarters of the training's interactions, from the most popular items on."""
QUARTERS = "Quarters of the training's interactions: few popular items make up the first one."


def popularity_groups(counts_V: np.ndarray) -> np.ndarray:
    """Return the place of each item in ``POPULARITY``, given how often it trains, both by id; id 0 is padding."""
    return np.where(counts_V > 0, quarters(counts_V), len(POPULARITY) - 1)


def rank_parts(
    rank_N: Sequence[int] | np.ndarray,
    group_N: np.ndarray,
    names: Sequence[str],
    path: Path,
    *,
    what: str,
    about: str,
    unit: str,
    recall_at: Sequence[int],
    ndcg_at: Sequence[int] = (),
    note: str = "",
) -> list[Part]:
    """Write the metrics of each group that has a rank as a CSV file, and return them as a table and a chart.

    Args:
        rank_N: the ranks, (N,), 1 the best.
        group_N: the place of each one's group in ``names``, (N,).
        names: names of the groups.
        path: the file.
        what: heading of the groups, such as "popularity".
        about: meaning of the groups, such as "popularity of the next item".
        unit: what has a rank, such as "users".
        recall_at, ndcg_at: numbers of best items at which both are measured.
        note: sentence below the table.
    """
    rank_N = np.asarray(rank_N, np.float64)
    titles = {f"recall_{k}": f"recall@{k}, %" for k in recall_at} | {f"ndcg_{k}": f"NDCG@{k}, %" for k in ndcg_at}
    titles["mrr"] = "MRR, %"
    values_N = {f"recall_{k}": rank_N <= k for k in recall_at}
    values_N |= {f"ndcg_{k}": (rank_N <= k) / np.log2(1 + rank_N) for k in ndcg_at} | {"mrr": 1 / rank_N}
    rows: list[dict[str, Any]] = []
    for place, name in enumerate(names):
        own_N = group_N == place
        if own_N.any():
            means = {metric: float(values_N[metric][own_N].mean()) for metric in titles}
            rows.append({what: name, unit: int(own_N.sum()), **means, "median_rank": float(np.median(rank_N[own_N]))})
    write_csv(path, rows)
    lines = tuple(
        (row[what], f"{row[unit]:,}", *(f"{100 * row[m]:.2f}" for m in titles), f"{row['median_rank']:,.0f}")
        for row in rows
    )
    table = Table(f"By the {about}", (what, unit, *titles.values(), "median rank"), lines, note=note)
    series = {title: tuple(100 * row[m] for row in rows) for m, title in titles.items() if m != "mrr"}
    last = f"recall_{recall_at[-1]}"
    best, worst = (f(rows, key=lambda row: row[last]) for f in (max, min))
    summary = (
        f"Recall@{recall_at[-1]} is highest for {best[what]}, {100 * best[last]:.1f} %, and lowest for {worst[what]}, "
        f"{100 * worst[last]:.1f} %."
    )
    return [table, BarChart(f"Ranks by {about}", summary, about, "%", tuple(row[what] for row in rows), series)]
