"""Columns of sequences: the last values, without those that have no row."""

from __future__ import annotations

import numpy as np

from apps.recsys.encoding.sequences import last_values, without_row_0


def test_the_last_values_are_kept():
    # Rows of 3, 0, 1 and 2 values; at most 2 are kept: positions 1 2, none, 3, 4 5.
    offsets, position = last_values(np.array([0, 3, 3, 4, 6]), 2)
    assert offsets.tolist() == [0, 2, 2, 3, 5]
    assert position.tolist() == [1, 2, 3, 4, 5]
    same, every = last_values(np.array([0, 3, 3, 4, 6]), 3)
    assert (same.tolist(), every.tolist()) == ([0, 3, 3, 4, 6], [0, 1, 2, 3, 4, 5])


def test_values_without_a_row_are_left_out():
    # [0 5] [] [0] [7 0 2] becomes [5] [] [] [7 2].
    offsets, rows = without_row_0(np.array([0, 2, 2, 3, 6]), np.array([0, 5, 0, 7, 0, 2], np.int32))
    assert offsets.tolist() == [0, 1, 1, 1, 3]
    assert rows.tolist() == [5, 7, 2]
