"""What reports say of labels and experts, by numbers that one can count: shares, groups, maps, a front, colours."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from apps.report.base import spread_places
from apps.report.classified import BINS, Answers
from apps.report.colors import color_of, expert_colors, ink_on
from apps.report.page import HeatmapChart, LineChart, Table
from apps.report.pareto import front
from apps.report.use import (
    check_bounds,
    entropy,
    maps_by_label,
    mutual_information,
    quarters,
    range_names,
    ranges_of,
    row_names,
    shares,
    typical_labels,
)

NAN = float("nan")


def test_counts_and_error_of_a_classifier():
    def logits(*probabilities):
        return torch.tensor(probabilities).log()

    answers = Answers(2)
    # Answers 0, 0, 1, 1 with probabilities 0.9, 0.9, 0.6, 1; the second and the third are wrong.
    answers.add(logits((0.9, 0.1), (0.9, 0.1), (0.4, 0.6)), torch.tensor([0, 1, 0]))
    answers.add(logits((0.0, 1.0)), torch.tensor([1]))
    assert answers.counts_CC.tolist() == [[1, 1], [1, 1]]
    assert BINS == 15
    # 0.9 lies in bin 13, 0.6 in bin 9, 1 in the last. Gaps: |1.8 - 1| + |0.6 - 0| + |1 - 1| = 1.4 of 4 answers.
    assert answers.bins_3B[0].nonzero()[0].tolist() == [9, 13, 14]
    assert answers.calibration_error == pytest.approx(0.35)
    confusion, calibration = answers.parts(["cat", "dog"])
    assert isinstance(confusion, HeatmapChart)
    assert confusion.values == ((50.0, 50.0), (50.0, 50.0))
    assert confusion.summary == "50.0 % lie on the diagonal; most often cat is taken for dog, 1 times."
    assert isinstance(calibration, LineChart)
    assert calibration.lines[0].x == pytest.approx((60.0, 90.0, 100.0))
    assert calibration.lines[0].y == pytest.approx((0.0, 50.0, 100.0))
    assert calibration.summary.endswith("4 answers; expected calibration error 35.00 %.")


def test_of_many_classes_the_commonest_confusions_are_listed_and_without_answers_nothing_is_shown():
    answers, wrong = Answers(50), torch.full((3, 50), -9.0)
    wrong[:, 7] = 9.0
    answers.add(wrong, torch.tensor([3, 3, 4]))
    table = answers.parts([f"c{i}" for i in range(50)])[0]
    assert isinstance(table, Table)
    assert table.rows == (("c3", "c7", "2"), ("c4", "c7", "1"))
    assert Answers(3).parts(["a", "b", "c"]) == []


def test_colors_of_experts_differ_and_what_is_written_on_them_is_clear():
    assert [len(set(expert_colors(n))) for n in (2, 8, 9, 64, 256)] == [2, 8, 9, 64, 256]
    assert (ink_on("#0072B2"), ink_on("#F0E442")) == ("#fff", "#000")
    colors = expert_colors(4)  # a label has the color of its first number
    assert [color_of(label, colors) for label in ("3 1", "4", "", "x")] == [colors[3], None, None, None]


def test_quarters_have_as_many_counts_ranges_hold_their_upper_bound_and_places_are_middles():
    # Of 16 counts 8 are of one thing, which begins in the first quarter; 4 begin at the third, and 1 each at the last.
    assert quarters(np.array([1, 8, 4, 1, 1, 1, 0])).tolist() == [3, 0, 2, 3, 3, 3, 3]
    assert quarters(np.array([2, 2, 2, 2])).tolist() == [0, 1, 2, 3]
    assert quarters(np.array([0, 0])).tolist() == [0, 0]
    names, places = range_names((2, 5)), ranges_of(np.array([1, 2, 3, 5, 6]), (2, 5))
    assert [names[place] for place in places] == ["1-2", "1-2", "3-5", "3-5", "over 5"]
    assert range_names(()) == ("all",)
    assert ranges_of(np.array([7]), ()).tolist() == [0]
    for bounds in ((0, 1), (2, 2), (3, 1)):
        with pytest.raises(ValueError, match=r"report.lengths=\(.*\) must be ascending numbers of at least 1"):
            check_bounds("report.lengths", bounds)
    assert [spread_places(*given) for given in ((6, 3), (3, 9))] == [[1, 3, 5], [0, 1, 2]]
    assert spread_places(5, 0) == spread_places(0, 5) == []


def test_maps_have_a_row_for_each_label_with_a_token_or_the_most_specialized_and_one_for_all():
    np.testing.assert_array_equal(shares(np.array([[1, 3], [0, 0]])), [[0.25, 0.75], [NAN, NAN]])
    assert row_names(("a", "b"), (0.996, 0.004)) == ("a (100 %)", "b (<1 %)", "all")
    # Of 8 tokens 4 are cats, none a dog, 4 owls.
    counts = {"block 1": np.array([[3, 1], [0, 0], [0, 4]])}
    (one,) = maps_by_label(counts, ("cat", "dog", "owl"), "Which", "class")
    assert (one.title, one.rows, one.columns) == ("Which, block 1", ("cat (50 %)", "owl (50 %)", "all"), ("0", "1"))
    assert one.values == ((75, 25), (0, 100), (37.5, 62.5))
    assert one.value_title == "share of the class's tokens, %"
    counts = np.full((50, 2), 5)
    counts[[7, 30]] = [[10, 0], [0, 10]]
    names = [f"class {i}" for i in range(50)]
    (one,) = maps_by_label({"block 1": counts}, names, "Which", "class", most_rows=2)
    assert one.title == "Which: the most specialized of 50, block 1"
    assert one.rows == ("class 7 (2 %)", "class 30 (2 %)", "all")
    assert one.values[-1] == pytest.approx((50, 50))


def test_entropy_and_mutual_information_are_in_bits_and_typical_labels_tell_most_of_their_expert():
    assert [entropy(np.array(counts)) for counts in ([4, 4], [2, 1, 1, 0], [0, 0, 0])] == [1.0, 1.5, 0.0]
    for counts, bits in (
        ([[2, 0], [0, 2]], 1.0),
        ([[1, 2], [2, 4]], 0.0),
        # H(E) = H(C) = 1; H(E, C) = 2 * 3/8 * log2(8/3) + 2 * 1/8 * log2(8) = 1.8113
        ([[3, 1], [1, 3]], 2 - 0.75 * np.log2(8 / 3) - 0.75),
        ([[0, 0], [0, 0]], 0.0),
    ):
        assert mutual_information(np.array(counts)) == pytest.approx(bits, abs=1e-12)
    # Of 20 pairs, 10 each expert. "a" comes 10 times, 5 in each: as by chance. "b" 6 times, 4 of them in expert 0.
    counts = np.array([[5, 5], [4, 2], [1, 0], [0, 3]])
    # b: 0.2 log(0.2 / 0.15) = 0.058; c: 0.05 log(0.05 / 0.025) = 0.035; d: 0.15 log(0.15 / 0.075) = 0.104
    assert typical_labels(counts, ["a", "b", "c", "d"]) == [["b", "c"], ["d"]]
    assert typical_labels(counts, ["a", "b", "c", "d"], most=1) == [["b"], ["d"]]


def test_on_the_front_are_points_that_no_other_beats():
    for quality, cost, higher, on in (
        ([0.9, 0.8, 0.7], [3, 2, 2], True, [1, 0]),
        ([0.9, 0.9, 0.9], [2, 1, 1], True, [1, 2]),  # equal points are both on it
        ([5.0, 4.0, 6.0], [1, 2, 3], False, [0, 1]),  # a loss
        ([], [], True, []),
    ):
        assert front(quality, cost, higher) == on
