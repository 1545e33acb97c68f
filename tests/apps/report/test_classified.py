"""Confusion and calibration of a classifier, on numbers that one can count."""

from __future__ import annotations

import pytest
import torch

from apps.report.classified import BINS, Answers
from apps.report.page import HeatmapChart, LineChart, Table


def logits(*probabilities: tuple[float, ...]) -> torch.Tensor:
    return torch.tensor(probabilities).log()


def test_counts_and_error():
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


def test_of_many_classes_the_commonest_confusions_are_listed():
    answers = Answers(50)
    wrong = torch.full((3, 50), -9.0)
    wrong[:, 7] = 9.0
    answers.add(wrong, torch.tensor([3, 3, 4]))
    table = answers.parts([f"c{i}" for i in range(50)])[0]
    assert isinstance(table, Table)
    assert table.rows == (("c3", "c7", "2"), ("c4", "c7", "1"))


def test_without_answers_nothing_is_shown():
    assert Answers(3).parts(["a", "b", "c"]) == []
