"""What the training rows hold in each column, in a few numbers, so that new rows can be compared with them."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace

import numpy as np
from numpy.typing import NDArray

_MOST_ROWS, _LEAST_SHARE = 20, 0.01
"""Values of a categorical column that are compared one by one: at most so many, each with at least this share."""
_EMPTY = 1e-4
"""Share that stands in for an empty bin's in a population stability index, which has a logarithm of it."""


@dataclass(frozen=True)
class Profile:
    """One column of the training rows.

    Attributes:
        missing: share of rows without a value; None: it is not known.
        unseen: share of values without a row of their own: they are rarer than ``min_count``.
        bounds: smallest and largest number; empty of categories.
        cuts: boundaries between bins of numbers: x is in bin i if ``cuts[i - 1] < x <= cuts[i]``. Nine deciles, where
            they differ.
        rows: rows of the frequent categories, each a bin; the last bin has all other values.
        shares: share of the values in each bin; empty: it is not known.
    """

    missing: float | None = None
    unseen: float = 0.0
    bounds: tuple[float, ...] = ()
    cuts: tuple[float, ...] = ()
    rows: tuple[int, ...] = ()
    shares: tuple[float, ...] = ()

    @classmethod
    def of_numbers(cls, values_N: NDArray[np.float32]) -> Profile:
        """Return the profile of numbers, NaN if missing."""
        present = values_N[~np.isnan(values_N)]
        cuts = np.unique(np.quantile(present, np.arange(0.1, 0.95, 0.1), method="lower")) if len(present) else present
        ends = (present.min(), present.max()) if len(present) else ()
        known = cls(bounds=(*map(float, ends),), cuts=(*map(float, cuts),))
        return known._with(Counts.of_numbers(known, values_N))

    @classmethod
    def of_categories(cls, rows: NDArray[np.int32], unseen: NDArray[np.bool_], missing: NDArray[np.bool_]) -> Profile:
        """Return the profile of categories.

        Args:
            rows: row number of each value that is there.
            unseen: whether a value has no row of its own.
            missing: whether a row of the table has no value.
        """
        import pyarrow as pa  # a model is loaded without it

        # Not by ``bincount``: a hashed column may have a billion rows.
        row, count = pa.array(rows[~unseen]).value_counts().flatten()
        order = np.lexsort((row, np.negative(count)))[:_MOST_ROWS]
        is_frequent = np.asarray(count)[order] >= max(_LEAST_SHARE * len(rows), 1)
        known = cls(rows=(*np.asarray(row)[order][is_frequent].tolist(),))
        return known._with(Counts.of_categories(known, rows, unseen, missing))

    def _with(self, counts: Counts) -> Profile:
        return replace(self, missing=counts.missing, unseen=counts.odd, shares=counts.shares)


@dataclass(frozen=True)
class Counts:
    """A column of rows by the bins of a ``Profile``; the counts of two tables add up.

    Attributes:
        num_rows: number of rows.
        num_missing: rows without a value.
        num_odd: numbers outside the profile's bounds, or categories that it lacks.
        bins: number of values in each bin.
        total: sum of the numbers.
    """

    num_rows: int
    num_missing: int
    num_odd: int
    bins: NDArray[np.int64]
    total: float = 0.0

    @classmethod
    def of_numbers(cls, profile: Profile, values_N: NDArray[np.float32]) -> Counts:
        present = values_N[~np.isnan(values_N)]
        low, high = profile.bounds or (-math.inf, math.inf)
        bins = np.bincount(np.searchsorted(profile.cuts, present), minlength=len(profile.cuts) + 1)
        num_odd = int(((present < low) | (present > high)).sum())
        num, total = len(values_N), float(present.sum(dtype=np.float64))
        return cls(num, num - len(present), num_odd, bins, total)

    @classmethod
    def of_categories(
        cls, profile: Profile, rows: NDArray[np.int32], unseen: NDArray[np.bool_], missing: NDArray[np.bool_]
    ) -> Counts:
        frequent = [np.count_nonzero(rows == row) for row in profile.rows]
        bins = np.array([*frequent, len(rows) - sum(frequent)])
        return cls(len(missing), int(missing.sum()), int(unseen.sum()), bins)

    def __add__(self, other: Counts) -> Counts:
        return Counts(*map(operator.add, astuple(self), astuple(other)))

    @property
    def num_values(self) -> int:
        """Number of values."""
        return int(self.bins.sum())

    @property
    def missing(self) -> float:
        """Share of rows without a value."""
        return self.num_missing / max(self.num_rows, 1)

    @property
    def odd(self) -> float:
        """Share of ``num_odd`` in the values."""
        return self.num_odd / max(self.num_values, 1)

    @property
    def shares(self) -> tuple[float, ...]:
        """Share of the values in each bin; empty without values."""
        return (*map(float, self.bins / self.num_values),) if self.num_values else ()


def stability_index(before: Sequence[float], now: Sequence[float]) -> float:
    """Return the population stability index of two distributions over the same bins, ``sum (q - p) log(q / p)``.

    0 if they are equal; by custom 0.1 is a shift and 0.25 a large one.
    """
    p, q = (np.maximum(np.asarray(shares, np.float64), _EMPTY) for shares in (before, now))
    return float(((q - p) * np.log(q / p)).sum())
