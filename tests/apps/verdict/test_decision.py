"""What intervals show, in one word."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from apps.report.intervals import CrossedInterval, crossed_interval
from apps.verdict.schedule import Answer, decide, last_line


def gain(mean: float, half_width: float | None) -> CrossedInterval:
    return CrossedInterval(mean, half_width, 3, 100, 1e-4, 1e-2, 1e-3)


@pytest.mark.parametrize(
    "mean, half_width, outcome",
    [
        (0.02, 0.01, "pays"),
        (-0.02, 0.01, "does not pay"),
        (0.02, 0.03, "undecided"),
        (-0.02, 0.03, "undecided"),
        (0.02, 0.02, "undecided"),  # an interval that ends at 0 holds it
        (-0.02, 0.02, "undecided"),
        (0.02, None, "undecided"),  # one seed
        (0.02, 0.0, "undecided"),  # equal values do not show a spread
    ],
)
def test_only_an_interval_without_zero_decides(mean, half_width, outcome):
    assert decide(gain(mean, half_width)) == outcome


def test_two_seeds_decide_nothing():
    assert decide(replace(gain(0.02, 0.01), count=2)) == "undecided"


def test_no_runs_decide_nothing():
    assert decide(None) == "undecided"


def test_seeds_that_agree_do_not_decide_what_the_examples_leave_open():
    better_by_example = np.where(np.arange(40) % 2, 1.0, -0.9)  # 0.05 on average, over 40 examples
    assert decide(crossed_interval(np.tile(better_by_example, (5, 1)))) == "undecided"
    assert decide(crossed_interval(np.tile(better_by_example, (5, 100)))) == "pays"


def test_the_last_line_has_both_answers():
    both = (Answer("equal FLOPs", "pays", gain(1, 0.5)), Answer("equal time", "does not pay", gain(-1, 0.5)))
    assert last_line(both) == "verdict: pays (equal FLOPs); does not pay (equal time)"
