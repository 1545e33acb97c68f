"""Means over seeds or samples with their confidence intervals, differences of two models, and verdicts on them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


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
        """Tell whether 0 lies outside; width 0 excludes nothing, since equal values do not show a spread, nor does
        NaN."""
        return bool(self.half_width) and (self.low > 0 or self.high < 0)


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


@dataclass(frozen=True)
class CrossedInterval(Interval):
    """The mean of values by seed and example, with the 95 % interval over other seeds and other examples.

    A value is modeled as a mean plus an effect of its seed, one of its example, and a rest of both, all of them random
    (a crossed random-effects design); the attributes that ``Interval`` lacks are estimates of its parts.

    Attributes:
        num_examples: number of examples N; ``count`` is the number of seeds S.
        seed_variance: variance of the seeds' effects.
        example_variance: variance of the examples' effects.
        rest_variance: variance of the rest.
    """

    num_examples: int
    seed_variance: float
    example_variance: float
    rest_variance: float

    def half_width_at(self, num_seeds: int, num_examples: int) -> float:
        """Return the half width to be expected of another number of seeds, from 2 on, and of examples."""
        ms_seed = num_examples * self.seed_variance + self.rest_variance
        ms_example = num_seeds * self.example_variance + self.rest_variance
        return float(_half_width(ms_seed, ms_example, self.rest_variance, num_seeds, num_examples))


def crossed_interval(values_SN: np.ndarray) -> CrossedInterval:
    """Return the mean and interval of ``values_SN``, the value of each seed (S) on each example (N).

    With the mean squares of seeds, examples and rest the variance of the mean is (MS_s + MS_e - MS_r) / (S N), and no
    less than either of the first two by itself. The degrees of freedom are Satterthwaite's, and at most S - 1 unless
    the seeds differ by no more than the rest explains (MS_s <= MS_r); likewise N - 1. Two seeds cannot show that they
    do not differ, and have one degree. So few seeds widen the interval as Student's t does, and count little only if
    the examples are all that varies. Without the limit the interval of two seeds would hold the mean 88 times of 100.
    Three seeds hide now and then that they differ: with the quantile of 95.6 %, 95 of 100 intervals hold the mean.

    Raises:
        ValueError: no value.

    Example::

        crossed_interval(np.array([[0.0, 2.0], [2.0, 4.0]]))
        # mean 2; seed means 1 and 3, example means 1 and 3: MS_s = MS_e = 4, MS_r = 0, variance (4 + 4) / 4 = 2,
        # 2^2 / (1^2 / 1 + 1^2 / 1) = 2 degrees of freedom, at most 1: 2 +- 12.706 * sqrt(2) = 2 +- 17.969
    """
    values_SN = np.asarray(values_SN, np.float64)
    if values_SN.ndim != 2 or not values_SN.size:
        raise ValueError(f"crossed_interval needs at least one value a seed: got shape {values_SN.shape}")
    S, N = values_SN.shape
    mean = float(values_SN.mean())
    seed_S, example_N = values_SN.mean(1), values_SN.mean(0)
    rest_SN = values_SN - seed_S[:, None] - example_N + mean
    ms_seed = N * float(seed_S.var(ddof=1)) if S > 1 else 0.0
    ms_example = S * float(example_N.var(ddof=1)) if N > 1 else 0.0
    ms_rest = float((rest_SN**2).sum()) / ((S - 1) * (N - 1)) if S > 1 and N > 1 else 0.0
    if np.ptp(values_SN) == 0:  # the mean of equal values is rounded, which is not a spread
        ms_seed = ms_example = ms_rest = 0.0
    return CrossedInterval(
        mean=mean,
        half_width=float(_half_width(ms_seed, ms_example, ms_rest, S, N)) if S > 1 else None,
        count=S,
        num_examples=N,
        seed_variance=max(ms_seed - ms_rest, 0.0) / N,
        example_variance=max(ms_example - ms_rest, 0.0) / S,
        rest_variance=ms_rest,
    )


def by_group(values_SN: np.ndarray, group_N: np.ndarray | None) -> np.ndarray:
    """Return one value for each group of examples, such as the rows of a user, with the same mean over all.

    Rows of one user are alike, and as single examples they would make an interval too narrow.

    Args:
        values_SN: values of each seed and example.
        group_N: int64, the group of each example, negative for one by itself; None: all are by themselves.
    """
    if group_N is None:
        return values_SN
    own_N = np.where(group_N < 0, -1 - np.arange(len(group_N)), group_N)
    place_N = np.unique(own_N, return_inverse=True)[1]
    sums_SU = np.stack([np.bincount(place_N, values_N) for values_N in values_SN])
    return sums_SU * (sums_SU.shape[1] / len(group_N))


def _half_width(ms_seed: Any, ms_example: Any, ms_rest: Any, S: int, N: int) -> Any:
    """Return half the width of the interval of mean squares, numbers or arrays of them."""
    from scipy.stats import t

    of_seeds, of_examples = ms_seed / (S * N), ms_example / (S * N)
    variance = np.maximum(of_seeds + of_examples - ms_rest / (S * N), np.maximum(of_seeds, of_examples))
    spread = of_seeds**2 / (S - 1) + of_examples**2 / max(N - 1, 1)
    freedom = np.maximum(variance**2 / np.maximum(spread, np.finfo(float).tiny), 1)
    for ms, n in ((ms_seed, S), (ms_example, N)):
        freedom = np.where((ms > ms_rest) | (n == 2), np.minimum(freedom, n - 1), freedom)
    return t.ppf(0.978 if S == 3 else 0.975, freedom) * np.sqrt(variance)


def paired_difference(a: Sequence[float], b: Sequence[float]) -> Interval:
    """Return the mean and the t-interval of ``a - b``, value by value: the effect of a seed's data order cancels.

    The values are measured in float32; differences that its rounding can explain count as equal and have no width.

    Raises:
        ValueError: the two differ in length, or are empty.
    """
    if len(a) != len(b):
        raise ValueError(f"a paired difference needs pairs: got {len(a)} and {len(b)} values")
    differences = [x - y for x, y in zip(a, b, strict=True)]
    # Each of the four values in two differences is off by half a unit in its last place at most.
    rounding = 4 * 2**-24 * max((abs(v) for v in (*a, *b)), default=0.0)
    if differences and max(differences) - min(differences) <= rounding:
        differences = [sum(differences) / len(differences)] * len(differences)
    return mean_interval(differences)


def verdict(difference: Interval, higher_is_better: bool = True) -> str:
    """Return "wins", "loses" or "no difference shown", for the first of the two."""
    if not difference.excludes_zero:
        return "no difference shown"
    return "wins" if (difference.mean > 0) == higher_is_better else "loses"


def quality_at(curve: Sequence[tuple[float, float]], seconds: float) -> float | None:
    """Return the last quality of a curve of (seconds, quality) within ``seconds``; None before the first.

    The best one would favor a fast model, which is validated more often by then.
    """
    return next((quality for time, quality in reversed(curve) if time <= seconds), None)


def nearest_first(rates: Sequence[float], is_usable: Sequence[bool], default: float) -> list[int]:
    """Return the indices of the runs that did not diverge, the ones with rates nearest to ``default``, by ratio, first.

    Raises:
        ValueError: every run diverged.
    """
    usable = [i for i, one in enumerate(is_usable) if one]
    if not usable:
        raise ValueError(f"training diverged at every learning rate of {', '.join(f'{r:g}' for r in rates)}")
    return sorted(usable, key=lambda i: abs(math.log(rates[i] / default)))


def choose(
    rates: Sequence[float], scores: Sequence[float | None], default: float, higher_is_better: bool = True
) -> int:
    """Return the index of the best score; of equal ones the rate nearest to ``default``, by ratio.

    A score of None is a run that diverged.

    Raises:
        ValueError: every run diverged.
    """
    usable = nearest_first(rates, [score is not None and math.isfinite(score) for score in scores], default)
    sign = 1 if higher_is_better else -1
    return max(usable, key=lambda i: sign * scores[i])  # type: ignore[operator]  # of equal ones the first
