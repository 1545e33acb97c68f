"""Integers that are ids: the label's mean of a value predicts held-out rows better than the order of the values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from apps.recsys.guesses import FEW_VALUES

_LOOKED_AT = 50_000
_HELD_OUT = 0.3
_PRIOR = 10.0
"""Rows of the overall mean that the mean of a value starts with."""
_LEAVES = (16, 128)
_LEAST_GAIN = 0.005
"""Least difference between the two R^2, which is also more than 4 standard errors."""


def ids_among_numbers(
    numbers: Mapping[str, NDArray[np.float64]], labels: Sequence[NDArray[np.float64]], seed: int = 0
) -> dict[str, str]:
    """Return the columns of integers whose values are ids rather than quantities, and why.

    On 70 % of the rows two predictors of a label are trained: its mean for each value, and decision trees of the
    number, to which only the order of the values is known. A column is one of ids if the means are clearly better on
    the other rows, for one of the labels.

    Args:
        numbers: values (N,) by column, NaN for none. Columns with fractions, with few values, and those whose values
            do not occur twice on average, are passed over.
        labels: values (N,) of each label, NaN for none.
        seed: seed of the split.

    Returns:
        By column, the two R^2 in words.
    """
    found = {}
    for column, number_N in numbers.items():
        known = number_N[np.isfinite(number_N)]
        num_values = len(np.unique(known))
        if num_values <= FEW_VALUES or 2 * num_values > len(known) or (np.floor(known) != known).any():
            continue
        for label_N in labels:
            by_value, by_order, error = _scores(number_N, label_N, seed)
            if by_value - by_order > max(_LEAST_GAIN, 4 * error):
                found[column] = f"their order says little of the label: R2 {by_order:.3f}, by value {by_value:.3f}"
                break
    return found


def _scores(number_N: NDArray[np.float64], label_N: NDArray[np.float64], seed: int) -> tuple[float, float, float]:
    """Return the R^2 of means by value and of the best tree on held-out rows, and their difference's standard error."""
    from sklearn.tree import DecisionTreeRegressor

    kept = np.flatnonzero(np.isfinite(number_N) & np.isfinite(label_N))
    kept = np.random.default_rng(seed).permutation(kept)[:_LOOKED_AT]
    num_held = round(_HELD_OUT * len(kept))
    held, rest = kept[:num_held], kept[num_held:]
    y, truth = label_N[rest], label_N[held]
    variance = float(np.var(truth)) if num_held else 0.0
    if not variance:
        return 0.0, 0.0, 0.0
    values, code = np.unique(number_N[rest], return_inverse=True)
    mean_V = (np.bincount(code, y) + _PRIOR * y.mean()) / (np.bincount(code) + _PRIOR)
    place = np.searchsorted(values, number_N[held]).clip(max=len(values) - 1)
    guess = np.where(values[place] == number_N[held], mean_V[place], y.mean())
    by_value = (guess - truth) ** 2
    by_order = min(
        ((_tree(DecisionTreeRegressor, leaves, number_N[rest], y, number_N[held]) - truth) ** 2 for leaves in _LEAVES),
        key=np.mean,
    )
    error = float(np.std(by_order - by_value) / np.sqrt(num_held) / variance)
    return float(1 - by_value.mean() / variance), float(1 - by_order.mean() / variance), error


def _tree(kind: type, leaves: int, x: NDArray[np.float64], y: NDArray[np.float64], new: NDArray[np.float64]) -> NDArray:
    tree = kind(max_leaf_nodes=leaves, min_samples_leaf=20, random_state=0)
    return tree.fit(x[:, None], y).predict(new[:, None])
