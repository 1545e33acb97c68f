"""The statistics of a comparison: differences over seeds, and verdicts on them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from apps.report.intervals import Interval, mean_interval


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

    The best one would favour a fast model, which is validated more often by then.
    """
    return next((quality for time, quality in reversed(curve) if time <= seconds), None)


def nearest_first(rates: Sequence[float], is_usable: Sequence[bool], default: float) -> list[int]:
    """Return the indices of the runs that did not diverge, those of the rates nearest to ``default``, by ratio, first.

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
