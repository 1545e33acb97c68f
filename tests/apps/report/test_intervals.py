"""Intervals over seeds and examples at once, by hand and by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import t

from apps.report.intervals import crossed_interval, mean_interval


def test_seeds_and_examples_that_count_alike():
    interval = crossed_interval(np.array([[0.0, 2.0], [2.0, 4.0]]))
    # Seed means 1 and 3, example means 1 and 3, no rest: MS_s = MS_e = 2 * 2 = 4; variance (4 + 4) / 4 = 2; degrees of
    # freedom 2^2 / (1^2 + 1^2) = 2. Effects have the variance 4 / 2 = 2 each.
    assert interval.mean == 2
    assert interval.half_width == pytest.approx(t.ppf(0.975, 2) * math.sqrt(2), rel=1e-12)
    assert (interval.seed_variance, interval.example_variance, interval.rest_variance) == (2, 2, 0)
    assert (interval.count, interval.num_examples) == (2, 2)


def test_equal_examples_leave_the_interval_over_seeds():
    by_seed = [1.0, 2.0, 3.0]
    interval = crossed_interval(np.repeat(np.array(by_seed)[:, None], 50, axis=1))
    assert interval.half_width == pytest.approx(mean_interval(by_seed).half_width, rel=1e-12)


def test_equal_seeds_leave_the_interval_over_examples():
    by_example = np.random.default_rng(0).normal(size=40)
    interval = crossed_interval(np.tile(by_example, (3, 1)))
    assert interval.half_width == pytest.approx(mean_interval(by_example.tolist()).half_width, rel=1e-9)


def test_one_seed_has_no_interval_and_equal_values_none_that_excludes_zero():
    assert crossed_interval(np.ones((1, 5))).half_width is None
    assert crossed_interval(np.full((3, 41), 0.1)).half_width == 0.0
    assert not crossed_interval(np.ones((3, 5))).excludes_zero
    with pytest.raises(ValueError, match="needs at least one value"):
        crossed_interval(np.ones((2, 0)))


def test_the_width_at_other_numbers_is_that_of_the_parts():
    interval = crossed_interval(np.array([[0.0, 2.0], [2.0, 4.0]]))
    assert interval.half_width_at(2, 2) == pytest.approx(interval.half_width, rel=1e-12)
    # Variances 2 and 2 over 8 seeds and 8 examples: 2 / 8 + 2 / 8, and (1/2)^2 / (2 (1/4)^2 / 7) = 14 degrees.
    assert interval.half_width_at(8, 8) == pytest.approx(t.ppf(0.975, 14) * math.sqrt(0.5), rel=1e-12)


@pytest.mark.parametrize("seed_sd, example_sd", [(1.0, 0.0), (0.3, 2.0), (0.0, 2.0)])
def test_intervals_hold_the_true_mean_as_often_as_they_say(seed_sd, example_sd):
    rng = np.random.default_rng(1)
    S, N, draws = 4, 60, 400
    held = 0
    for _ in range(draws):
        effects = seed_sd * rng.normal(size=(S, 1)) + example_sd * rng.normal(size=N)
        interval = crossed_interval(0.5 + effects + rng.normal(size=(S, N)))
        held += interval.low <= 0.5 <= interval.high
    # 95 % of 400 is 380, with a standard deviation of 4.4; the approximation may err to the safe side.
    assert held >= 367
