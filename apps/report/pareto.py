"""The front of the points that no other beats in quality and cost."""

from __future__ import annotations

from collections.abc import Sequence


def front(quality: Sequence[float], cost: Sequence[float], higher: bool) -> list[int]:
    """Return the points on the Pareto front, by rising cost: no other point is as good in both, and better in one.

    Args:
        quality: of each point.
        cost: of each point; the less the better.
        higher: whether a higher quality is better.

    Example::

        front([0.9, 0.8, 0.7], [3, 2, 2], higher=True)      # [1, 0]: point 2 costs as 1 does, and is worse
    """
    sign = 1.0 if higher else -1.0
    points = [(c, -sign * q, i) for i, (q, c) in enumerate(zip(quality, cost, strict=True)) if c is not None]
    kept: list[tuple[float, float, int]] = []
    for c, worse, i in sorted(points):
        if not kept or worse < kept[-1][1] or (c, worse) == kept[-1][:2]:
            kept.append((c, worse, i))
    return [i for *_, i in kept]
