"""Means over seeds or draws, with their confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % interval (Student's t).

    Attributes:
        mean: mean of the values.
        half_width: half the width of the interval; None for fewer than two values.
        count: number of values.
    """

    mean: float
    half_width: float | None
    count: int

    @property
    def low(self) -> float:
        return self.mean - (self.half_width or 0.0)

    @property
    def high(self) -> float:
        return self.mean + (self.half_width or 0.0)

    def negated(self) -> Interval:
        """Return the interval of the values with the other sign."""
        return Interval(-self.mean, self.half_width, self.count)

    @property
    def excludes_zero(self) -> bool:
        """Tell whether 0 lies outside; width 0 excludes nothing, since equal values do not show a spread."""
        return bool(self.half_width) and not self.low <= 0 <= self.high


def mean_interval(values: Sequence[float]) -> Interval:
    """Return the mean and t-interval of ``values``: half width ``t_{0.975, n - 1} * s / sqrt(n)``.

    Raises:
        ValueError: no value.

    Example::

        mean_interval([1.0, 2.0, 3.0])     # 2 +- 4.3027 * 1 / sqrt(3) = 2 +- 2.4841
    """
    n = len(values)
    if n == 0:
        raise ValueError("mean_interval needs at least one value")
    mean = math.fsum(values) / n
    if n == 1:
        return Interval(mean, None, 1)
    from scipy.stats import t

    deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1))
    return Interval(mean, float(t.ppf(0.975, n - 1)) * deviation / math.sqrt(n), n)
