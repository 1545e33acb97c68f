"""The front of points that no other beats."""

from __future__ import annotations

import pytest

from apps.report.pareto import front


@pytest.mark.parametrize(
    "quality, cost, higher, on",
    [
        ([0.9, 0.8, 0.7], [3, 2, 2], True, [1, 0]),
        ([0.9, 0.9, 0.9], [2, 1, 1], True, [1, 2]),  # equal points are both on it
        ([5.0, 4.0, 6.0], [1, 2, 3], False, [0, 1]),  # a loss
        ([], [], True, []),
    ],
)
def test_front(quality, cost, higher, on):
    assert front(quality, cost, higher) == on
