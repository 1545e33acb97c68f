"""What experts say of labels, by small tables."""

from __future__ import annotations

import numpy as np
import pytest

from apps.report.use import entropy, mutual_information, typical_labels


def test_entropy_is_in_bits():
    assert entropy(np.array([4, 4])) == 1.0
    assert entropy(np.array([2, 1, 1, 0])) == 1.5
    assert entropy(np.zeros(3, int)) == 0.0


@pytest.mark.parametrize(
    ("counts", "bits"),
    [
        ([[2, 0], [0, 2]], 1.0),
        ([[1, 2], [2, 4]], 0.0),
        # H(E) = H(C) = 1; H(E, C) = 2 * 3/8 * log2(8/3) + 2 * 1/8 * log2(8) = 1.8113
        ([[3, 1], [1, 3]], 2 - 0.75 * np.log2(8 / 3) - 0.75),
        ([[0, 0], [0, 0]], 0.0),
    ],
)
def test_mutual_information_of_small_tables(counts, bits):
    assert mutual_information(np.array(counts)) == pytest.approx(bits, abs=1e-12)


def test_typical_labels_are_those_that_tell_most_of_their_expert():
    # Of 20 pairs, 10 each expert. "a" comes 10 times, 5 in each: as by chance. "b" 6 times, 4 of them in expert 0.
    counts = np.array([[5, 5], [4, 2], [1, 0], [0, 3]])
    # b: 0.2 log(0.2 / 0.15) = 0.058; c: 0.05 log(0.05 / 0.025) = 0.035; d: 0.15 log(0.15 / 0.075) = 0.104
    assert typical_labels(counts, ["a", "b", "c", "d"]) == [["b", "c"], ["d"]]
    assert typical_labels(counts, ["a", "b", "c", "d"], most=1) == [["b"], ["d"]]
