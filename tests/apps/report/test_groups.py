"""Quarters by frequency and ranges of a length, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from apps.report.base import spread_places
from apps.report.use import check_bounds, quarters, range_names, ranges_of


def test_quarters_have_as_many_counts_each():
    # Of 16 counts 8 are of one thing, which begins in the first quarter; 4 begin at the third, and 1 each at the last.
    assert quarters(np.array([1, 8, 4, 1, 1, 1, 0])).tolist() == [3, 0, 2, 3, 3, 3, 3]
    assert quarters(np.array([2, 2, 2, 2])).tolist() == [0, 1, 2, 3]
    assert quarters(np.array([0, 0])).tolist() == [0, 0]


def test_ranges_hold_their_upper_bound():
    names, places = range_names((2, 5)), ranges_of(np.array([1, 2, 3, 5, 6]), (2, 5))
    assert [names[place] for place in places] == ["1-2", "1-2", "3-5", "3-5", "over 5"]
    assert range_names(()) == ("all",)
    assert ranges_of(np.array([7]), ()).tolist() == [0]


@pytest.mark.parametrize("bounds", [(0, 1), (2, 2), (3, 1)])
def test_bounds_that_do_not_rise_are_refused(bounds):
    with pytest.raises(ValueError, match=r"report.lengths=\(.*\) must be ascending numbers of at least 1"):
        check_bounds("report.lengths", bounds)


def test_places_are_the_middles_of_equal_parts():
    assert spread_places(6, 3) == [1, 3, 5]
    assert spread_places(3, 9) == [0, 1, 2]
    assert spread_places(5, 0) == spread_places(0, 5) == []
