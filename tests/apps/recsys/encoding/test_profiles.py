"""Profiles of columns, by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from apps.recsys.encoding.profiles import Counts, Profile, stability_index

NAN = float("nan")


def test_the_stability_index_by_hand():
    # (0.9 - 0.5) ln(0.9 / 0.5) + (0.1 - 0.5) ln(0.1 / 0.5) = 0.4 * 0.587787 + 0.4 * 1.609438 = 0.878890
    assert stability_index((0.5, 0.5), (0.9, 0.1)) == pytest.approx(0.878890, abs=1e-6)
    assert stability_index((0.3, 0.7), (0.3, 0.7)) == 0
    # An empty bin counts as 1 in 10,000: 0.4999 ln 5000, and 0.5 ln 2 for the one that took its rows.
    assert stability_index((0.5, 0.5), (1, 0)) == pytest.approx(0.4999 * math.log(5000) + 0.5 * math.log(2))


def test_numbers_by_deciles_and_their_range():
    values = np.array([*range(1, 21), *[NAN] * 5], np.float32)  # two numbers in each tenth, a fifth is missing
    profile = Profile.of_numbers(values)
    assert (profile.missing, profile.bounds) == (0.2, (1, 20))
    assert profile.cuts == (2, 4, 6, 8, 10, 12, 14, 16, 18)
    assert profile.shares == (0.1,) * 10
    # A number that most rows have is one bin: 0 up to the sixth decile.
    assert Profile.of_numbers(np.array([0] * 7 + [1, 2, 3], np.float32)).cuts == (0, 1, 2)
    # 2 is in the first bin, 2.5 in the second, 21 and 30 are outside; half of the counts come from each table.
    parts = [Counts.of_numbers(profile, np.array(part, np.float32)) for part in ([2, 2.5, NAN], [21, 30, 18])]
    counts = parts[0] + parts[1]
    assert (counts.num_rows, counts.num_missing, counts.num_odd, counts.total) == (6, 1, 2, 73.5)
    assert counts.bins.tolist() == [1, 1, 0, 0, 0, 0, 0, 0, 1, 2]
    assert Profile.of_numbers(np.array([NAN], np.float32)) == Profile(missing=1.0)


def test_categories_by_frequent_rows():
    # 6 of 10 values have row 1, 3 row 2, and one is too rare for a row; 2 of 12 rows of the table have no value.
    rows = np.array([1] * 6 + [2] * 3 + [0], np.int32)
    unseen = rows == 0
    profile = Profile.of_categories(rows, unseen, np.arange(12) < 2)
    assert profile == Profile(missing=2 / 12, unseen=0.1, rows=(1, 2), shares=(0.6, 0.3, 0.1))
    # Values below 1 % are counted together: 3 of 400 have row 2.
    rows = np.array([1] * 397 + [2] * 3, np.int32)
    profile = Profile.of_categories(rows, rows == 0, np.zeros(400, bool))
    assert (profile.rows, profile.shares) == ((1,), (0.9925, 0.0075))
