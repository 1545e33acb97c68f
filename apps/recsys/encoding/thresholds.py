"""Thresholds at which a column of numbers is cut into bins: its quantiles, and where a tree of each label splits it."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from apps.recsys.encoding.features import Target
from apps.recsys.encoding.numbers import boundaries

_BINS = 25
_LEAVES, _LEAST_ROWS, _MOST_ROWS = 48, 15, 100_000
_MOST_CLASSES = 32


def thresholds(
    values_N: NDArray[np.float32], labels: Iterable[tuple[Target, NDArray[np.float32]]]
) -> tuple[float, ...]:
    """Return ascending thresholds of a column: its value is in bin i if ``thresholds[i - 1] < x <= thresholds[i]``.

    They are 24 quantiles, and the splits of a decision tree of at most 48 leaves for each task. Each one is a value of
    the column, the largest below the tree's split, and none is the largest value: so no bin is empty. At most 100,000
    rows are looked at, always the same ones.

    Args:
        values_N: values of the training rows, NaN if missing.
        labels: target of each task, and its labels of these rows as batches have them, NaN for none.
    """
    rows = np.flatnonzero(~np.isnan(values_N))
    if len(rows) > _MOST_ROWS:
        rows = np.random.default_rng(0).choice(rows, _MOST_ROWS, replace=False)
    # A tree sees the places of the values: it would not tell values apart that differ by less than 1e-7.
    values, place_n = np.unique(values_N[rows], return_inverse=True)
    found = [boundaries(np.sort(values_N[rows]), _BINS)]
    found += [values[_splits(place_n, target, label_N[rows])] for target, label_N in labels]
    edges = np.unique(np.concatenate(found))
    return tuple(edges[edges < values[-1]].tolist()) if len(edges) else ()


def _splits(place_n: NDArray[np.int64], target: Target, label_n: NDArray[np.float32]) -> NDArray[np.int64]:
    """Return the places below the splits of a task's tree; none where the labels are all alike."""
    from sklearn.tree import DecisionTreeClassifier, DecisionTreeRegressor

    known_n = ~np.isnan(label_n)
    y_n = (target.numbers_of(label_n) if target.kind == "ordinal" else label_n.astype(np.float64))[known_n]
    least = max(_LEAST_ROWS, len(y_n) // 4_000)
    if len(y_n) < 2 * least or np.ptp(y_n) == 0:
        return np.empty(0, np.int64)
    of_classes = target.kind in ("binary", "multiclass")
    if target.kind == "multiclass":  # the time of a tree grows with the classes: rare ones are one
        frequent = np.argsort(-np.array(target.shares), kind="stable")[:_MOST_CLASSES]
        y_n = np.where(np.isin(y_n, frequent), y_n, -1)
    kind = DecisionTreeClassifier if of_classes else DecisionTreeRegressor
    tree = kind(max_leaf_nodes=_LEAVES, min_samples_leaf=least, random_state=0).fit(place_n[known_n, None], y_n).tree_
    return np.floor(tree.threshold[tree.feature >= 0]).astype(np.int64)
