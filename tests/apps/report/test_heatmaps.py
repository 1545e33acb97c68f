"""Counts as shares and maps: which rows of counts have a place."""

from __future__ import annotations

import numpy as np
import pytest

from apps.report.use import maps_by_label, row_names, shares

NAN = float("nan")


def test_counts_become_shares_of_their_row():
    np.testing.assert_array_equal(shares(np.array([[1, 3], [0, 0]])), [[0.25, 0.75], [NAN, NAN]])


def test_a_row_says_its_share():
    assert row_names(("a", "b"), (0.996, 0.004)) == ("a (100 %)", "b (<1 %)", "all")


def test_maps_have_a_row_for_each_label_with_a_token_and_one_for_all():
    # Of 8 tokens 4 are cats, none a dog, 4 owls.
    counts = {"block 1": np.array([[3, 1], [0, 0], [0, 4]])}
    (one,) = maps_by_label(counts, ("cat", "dog", "owl"), "Which", "class")
    assert (one.title, one.rows, one.columns) == ("Which, block 1", ("cat (50 %)", "owl (50 %)", "all"), ("0", "1"))
    assert one.values == ((75, 25), (0, 100), (37.5, 62.5))
    assert one.value_title == "share of the class's tokens, %"


def test_of_many_labels_the_most_specialized_are_kept():
    counts = np.full((50, 2), 5)
    counts[[7, 30]] = [[10, 0], [0, 10]]
    names = [f"class {i}" for i in range(50)]
    (one,) = maps_by_label({"block 1": counts}, names, "Which", "class", most_rows=2)
    assert one.title == "Which: the most specialized of 50, block 1"
    assert one.rows == ("class 7 (2 %)", "class 30 (2 %)", "all")
    assert one.values[-1] == pytest.approx((50, 50))
