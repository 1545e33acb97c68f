"""The statistics of a comparison, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from apps.report.intervals import Interval, choose, mean_interval, paired_difference, quality_at, verdict


def test_mean_interval_is_students_t():
    # 1, 2, 3: mean 2, deviation 1, t(0.975, 2) = 4.30265, half width 4.30265 / sqrt(3) = 2.48414
    interval = mean_interval([1.0, 2.0, 3.0])
    assert interval.mean == 2
    assert interval.half_width == pytest.approx(2.48414, abs=1e-5)
    assert (interval.low, interval.high) == pytest.approx((-0.48414, 4.48414), abs=1e-5)
    assert not interval.excludes_zero


def test_one_value_has_no_interval():
    assert mean_interval([0.5]) == Interval(0.5, None, 1)
    assert verdict(mean_interval([0.5])) == "no difference shown"


def test_pairing_removes_what_both_share():
    # Seeds differ by 10 points, the two systems by 1.0, 1.1, 0.9: mean 1, deviation 0.1, half 4.30265 * 0.1 / sqrt(3)
    difference = paired_difference([91.0, 81.1, 70.9], [90.0, 80.0, 70.0])
    assert difference.mean == pytest.approx(1.0)
    assert difference.half_width == pytest.approx(0.24841, abs=1e-4)
    assert verdict(difference) == "wins"
    assert verdict(difference, higher_is_better=False) == "loses"


def test_equal_differences_are_no_evidence():
    # An interval of width 0 only says that the seeds agree.
    assert verdict(paired_difference([2.0, 3.0], [1.0, 2.0])) == "no difference shown"


@pytest.mark.parametrize(
    "ours, theirs", [((43, 39), (40, 36)), ((143, 101, 130), (140, 98, 127)), ((90, 88), (91, 89))]
)
def test_float32_rounding_of_equal_differences_is_no_evidence(ours, theirs):
    # Accuracies on 144 images, each with as many right ones more.
    a, b = (torch.tensor([n / 144 for n in counts]).tolist() for counts in (ours, theirs))
    difference = paired_difference(a, b)
    assert difference.half_width == 0
    assert difference.mean == pytest.approx((ours[0] - theirs[0]) / 144)
    assert verdict(difference) == "no difference shown"
    # One image of a million is a difference that float32 tells.
    other = [b[0] + 1e-6, *b[1:]]
    assert paired_difference(a, other).half_width > 0


def test_pairs_are_needed():
    with pytest.raises(ValueError, match="got 2 and 1 values"):
        paired_difference([1.0, 2.0], [1.0])


def test_quality_at_is_the_last_validation_in_time():
    curve = [(1.0, 0.5), (2.0, 0.7), (3.0, 0.6)]
    assert quality_at(curve, 0.9) is None
    assert quality_at(curve, 2.0) == 0.7
    assert quality_at(curve, 9.0) == 0.6


def test_choose_takes_the_best_rate_and_of_equal_ones_the_nearest():
    rates = (0.1, 0.3, 0.9)
    assert choose(rates, [0.5, 0.7, 0.6], 0.3) == 1
    assert choose(rates, [0.5, 0.7, 0.6], 0.3, higher_is_better=False) == 0
    assert choose(rates, [0.7, 0.6, 0.7], 0.2) == 0  # 0.1 is 2 times off, 0.9 is 4.5 times
    assert choose(rates, [None, 0.2, math.nan], 0.3) == 1
    with pytest.raises(ValueError, match=r"diverged at every learning rate of 0\.1, 0\.3, 0\.9"):
        choose(rates, [None, None, None], 0.3)
