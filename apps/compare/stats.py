"""The statistics of a comparison: means and differences over seeds, and what they allow to be said."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Interval:
    """A mean over seeds and its 95 % interval (Student's t).

    Attributes:
        mean: of the values.
        half_width: of the interval; None for fewer than two values.
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
        """Of the values with the other sign."""
        return Interval(-self.mean, self.half_width, self.count)

    @property
    def excludes_zero(self) -> bool:
        """An interval of width 0 excludes nothing: equal values do not tell how far others would spread."""
        return bool(self.half_width) and not self.low <= 0 <= self.high


def mean_interval(values: Sequence[float], level: float = 0.95) -> Interval:
    """Mean and t-interval of ``values``: half width ``t_{(1 + level) / 2, n - 1} * s / sqrt(n)``.

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
    return Interval(mean, float(t.ppf((1 + level) / 2, n - 1)) * deviation / math.sqrt(n), n)


def paired_difference(a: Sequence[float], b: Sequence[float], level: float = 0.95) -> Interval:
    """Mean and t-interval of ``a - b``, value by value: what both share (a seed's data order) cancels.

    Raises:
        ValueError: the two differ in length, or are empty.
    """
    if len(a) != len(b):
        raise ValueError(f"a paired difference needs pairs: got {len(a)} and {len(b)} values")
    return mean_interval([x - y for x, y in zip(a, b, strict=True)], level)


def verdict(difference: Interval, higher_is_better: bool = True) -> str:
    """ "wins", "loses" or "no difference shown", for the first of the two."""
    if not difference.excludes_zero:
        return "no difference shown"
    return "wins" if (difference.mean > 0) == higher_is_better else "loses"


def quality_at(curve: Sequence[tuple[float, float]], seconds: float) -> float | None:
    """The last quality of a curve of (seconds, quality) that was reached within ``seconds``; None before the first.

    The last and not the best one: a slow model is validated less often by then, and would have fewer draws.
    """
    return next((quality for time, quality in reversed(curve) if time <= seconds), None)


def choose(
    rates: Sequence[float], scores: Sequence[float | None], default: float, higher_is_better: bool = True
) -> int:
    """Index of the best score; of equal ones the rate nearest to ``default``, by ratio. None is a run that diverged.

    Raises:
        ValueError: every run diverged.
    """
    usable = [i for i, score in enumerate(scores) if score is not None and math.isfinite(score)]
    if not usable:
        raise ValueError(f"training diverged at every learning rate of {', '.join(f'{r:g}' for r in rates)}")
    sign = 1 if higher_is_better else -1
    return max(usable, key=lambda i: (sign * scores[i], -abs(math.log(rates[i] / default))))  # type: ignore[operator]
