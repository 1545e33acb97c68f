"""The front of points that no other beats, and its picture."""

from __future__ import annotations

import pytest

from apps.report.pareto import Weighed, front, quality_against_costs


@pytest.mark.parametrize(
    "quality, cost, higher, on",
    [
        ([0.9, 0.8, 0.7, 0.8], [3, 2, 2, None], True, [1, 0]),
        ([0.9, 0.9, 0.9], [2, 1, 1], True, [1, 2]),  # equal points are both on it
        ([5.0, 4.0, 6.0], [1, 2, 3], False, [0, 1]),  # a loss
        ([1.0], [None], True, []),
    ],
)
def test_front(quality, cost, higher, on):
    assert front(quality, cost, higher) == on


POINTS = (
    Weighed("as trained", "", 90.0, (10.0, 5.0), (None, None)),
    Weighed("fewer", "K=2", 90.0, (9.9, 5.0), ((9.0, 11.0), None)),
    Weighed("fewer", "K=1", 89.9, (9.8, 5.0), ((9.5, 9.9), None)),
    Weighed("less", "c=1", 89.8, (9.9, 4.0), ((9.0, 9.9), None)),
)


def test_a_panel_a_cost_and_a_series_a_kind():
    fig = quality_against_costs(POINTS, ["latency, ms", "memory, MB"], "top1, %", True, "a title")
    assert [axis.get_xlabel() for axis in fig.axes] == ["latency, ms", "memory, MB"]
    (legend,) = fig.legends
    assert [text.get_text() for text in legend.get_texts()] == ["Pareto front", "as trained", "fewer", "less"]
    for axis in fig.axes:
        low, high = axis.get_ylim()
        assert low < high
        boxes = [text.get_window_extent() for text in axis.texts if text.get_text()]
        assert len(boxes) == 3
        for number, box in enumerate(boxes):
            assert box.count_overlaps(boxes[number + 1 :]) == 0


def test_up_is_better_for_a_loss_too():
    fig = quality_against_costs(POINTS, ["a", "b"], "loss", False, "a title")
    low, high = fig.axes[0].get_ylim()
    assert low > high
