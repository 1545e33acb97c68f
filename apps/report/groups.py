"""Groups of examples: quarters by frequency, from the common to the rare, and ranges of a length."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

QUARTERS = ("frequent", "2nd quarter", "3rd quarter", "rare")
"""The names of the quarters, by number."""


def quarters(counts_V: np.ndarray) -> np.ndarray:
    """Return the quarter of each of V things, int64 (V,), 0 to 3: "frequent" are the first ones by falling count, as
    many as make up a quarter of all that was counted, then those of the "2nd" and the "3rd quarter", and the "rare" of
    the last. Among equal counts the lower place goes first.

    Args:
        counts_V: how often each came.
    """
    order = np.argsort(-counts_V, kind="stable")
    counts = counts_V[order].astype(np.int64)
    before = np.cumsum(counts) - counts
    quarter_V = np.empty(len(counts_V), np.int64)
    quarter_V[order] = np.minimum(4 * before // max(int(counts.sum()), 1), 3)
    return quarter_V


def range_names(bounds: Sequence[int]) -> tuple[str, ...]:
    """Return the names of the ranges up to each of ascending bounds, and beyond the last: "1-5", ..., "over 50"."""
    names = [f"{low + 1}-{high}" for low, high in zip((0, *bounds), bounds, strict=False)]
    return (*names, f"over {bounds[-1]}" if bounds else "all")


def ranges_of(values_N: np.ndarray, bounds: Sequence[int]) -> np.ndarray:
    """Return the place of each value's range in ``range_names``, int64 (N,)."""
    return np.searchsorted(np.asarray(bounds, np.int64), values_N, side="left")


def check_bounds(name: str, bounds: Sequence[int]) -> None:
    """Raise a ``ValueError`` that names the option, unless the bounds rise from 1 on."""
    if any(a >= b for a, b in zip((0, *bounds), bounds, strict=False)):
        raise ValueError(f"{name}={tuple(bounds)} must be ascending numbers of at least 1")
