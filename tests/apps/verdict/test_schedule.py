"""How many seeds and steps fit, sums of seconds by hand, and what the intervals show in one word."""

from dataclasses import replace

import numpy as np
import pytest

from apps.report.intervals import CrossedInterval, crossed_interval
from apps.verdict.schedule import (
    Answer,
    Schedule,
    Speed,
    decide,
    equal_time_steps,
    last_line,
    make_schedule,
    rungs,
    search_seconds,
    seed_seconds,
)

SPEEDS = {"sparse": Speed(0.02, 1.0, 0.5, 2.0), "dense": Speed(0.01, 1.0, 0.5, 2.0)}
RATES = (0.1, 0.3, 0.9)


def test_the_better_half_goes_on_and_seconds_are_those_of_all_runs():
    assert rungs(3, 400) == [(3, 100), (2, 200)]
    assert rungs(1, 400) == rungs(0, 400) == []
    assert rungs(9, 100) == [(9, 25), (5, 50), (3, 100), (2, 100)]  # never more than a final run has
    # Sparse: 3 (1 + 100 * .02 + .5) + 2 (1 + 200 * .02 + .5) = 10.5 + 11; dense: 3 * 2.5 + 2 * 3.5 = 14.5.
    assert search_seconds(Schedule(5, 400, RATES), SPEEDS) == pytest.approx(36.0)
    # With 8 validations of .5 s: sparse 1 + 8 + 4 + 2, dense 1 + 4 + 4 + 2, sparse at equal time 200 steps: the same.
    assert seed_seconds(400, SPEEDS) == pytest.approx(37.0)


@pytest.mark.parametrize(
    "sparse, dense, steps", [(0.02, 0.01, 50), (0.01, 0.02, 200), (0.01, 0.0102, 100), (0.01, 0.0104, 104)]
)
def test_equal_time_is_steps_by_the_ratio_of_seconds(sparse, dense, steps):
    assert equal_time_steps(100, sparse, dense) == steps


def test_all_configured_steps_then_fewer_and_then_fewer_seeds():
    # 36 s of search and 37 s a seed: 36 + 7 * 37 = 295, 36 + 8 * 37 = 332.
    assert make_schedule(331.9, 400, RATES, SPEEDS, 5) == Schedule(7, 400, RATES)
    assert make_schedule(1e6, 400, RATES, SPEEDS, 5) == Schedule(10, 400, RATES)
    # Of n steps, a multiple of 4, the search takes 15 s and 1.75 * .03 n; a seed 21 s and .02 n + .01 n + .01 n.
    # Five seeds: 15 + 105 + (.0525 + .2) n = 120 + .2525 n; for 300 of 400 steps 195.75 s.
    assert make_schedule(195.8, 400, RATES, SPEEDS, 5) == Schedule(5, 300, RATES)
    # Five seeds leave less than 200 steps in 148 s: 120 + .2525 * 200 = 170.5. Four have 99 + .2125 n: 230 steps.
    schedule = make_schedule(148.0, 400, RATES, SPEEDS, 5)
    assert schedule.seeds == 4
    assert schedule.steps == pytest.approx(230, abs=2)  # rungs are rounded up
    # Three seeds: 15 + 63 + (.0525 + .12) n = 78 + .1725 n.
    assert make_schedule(88.4, 400, RATES, SPEEDS, 1) == Schedule(3, 60, RATES)


def test_a_budget_that_fits_none_says_what_would_and_without_a_rate_there_is_no_search():
    # Three seeds of 20 steps: 78 + .1725 * 20 = 81.45 s, 61.45 more than there are: 1.02 minutes more, and a tenth for
    # the reserve: 1.1 * 1.52 = 1.68, rounded up.
    with pytest.raises(ValueError, match=r"minutes=0\.5 fits no comparison: 3 seeds of 20 steps.*about 1\.7 minutes"):
        make_schedule(20.0, 400, RATES, SPEEDS, 0.5)
    assert search_seconds(Schedule(5, 400, ()), SPEEDS) == 0
    assert make_schedule(37 * 6 + 1.0, 400, (), SPEEDS, 5) == Schedule(6, 400, ())


def gain(mean: float, half_width: float | None) -> CrossedInterval:
    return CrossedInterval(mean, half_width, 3, 100, 1e-4, 1e-2, 1e-3)


@pytest.mark.parametrize("mean, half_width, outcome", [
    (0.02, 0.01, "pays"),
    (-0.02, 0.01, "does not pay"),
    (0.02, 0.03, "undecided"),
    (-0.02, 0.03, "undecided"),
    (0.02, 0.02, "undecided"),  # an interval that ends at 0 holds it
    (-0.02, 0.02, "undecided"),
    (0.02, None, "undecided"),  # one seed
    (0.02, 0.0, "undecided"),  # equal values do not show a spread
])  # fmt: skip
def test_only_an_interval_without_zero_decides(mean, half_width, outcome):
    assert decide(gain(mean, half_width)) == outcome


def test_two_seeds_and_what_examples_leave_open_decide_nothing():
    assert decide(replace(gain(0.02, 0.01), count=2)) == decide(None) == "undecided"
    better_by_example = np.where(np.arange(40) % 2, 1.0, -0.9)  # 0.05 on average, over 40 examples
    assert decide(crossed_interval(np.tile(better_by_example, (5, 1)))) == "undecided"
    assert decide(crossed_interval(np.tile(better_by_example, (5, 100)))) == "pays"
    both = (Answer("equal FLOPs", "pays", gain(1, 0.5)), Answer("equal time", "does not pay", gain(-1, 0.5)))
    assert last_line(both) == "verdict: pays (equal FLOPs); does not pay (equal time)"
