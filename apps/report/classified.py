"""The answers of a classifier: which class is taken for which, and how often it is right when it is sure."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from apps.report.page import HeatmapChart, Line, LineChart, Part, Table
from apps.report.use import shares

BINS = 15
"""Bins of equal width by the probability of the answer."""

MOST_CLASSES = 40
"""Classes up to which each has a row; of more, the commonest confusions are listed."""


class Answers:
    """Counts a classifier's answers by true class, and by their probability.

    Args:
        num_classes: C.

    Attributes:
        counts_CC: int64 (C, C), true classes by answers.
        bins_3B: float64 (3, B): number of answers, sum of their probabilities, number of right ones.
    """

    def __init__(self, num_classes: int) -> None:
        self.counts_CC = np.zeros((num_classes, num_classes), dtype=np.int64)
        self.bins_3B = np.zeros((3, BINS))

    @torch.no_grad()
    def add(self, logits_BC: Tensor, label_B: Tensor) -> None:
        """Add a batch: logits (B, C) and int64 labels (B,)."""
        probability_B, answer_B = (x.cpu() for x in logits_BC.float().softmax(-1).max(-1))
        label_B = label_B.cpu()
        np.add.at(self.counts_CC, (label_B.numpy(), answer_B.numpy()), 1)
        bin_B = (probability_B * BINS).long().clamp(max=BINS - 1)
        rows = (torch.ones(len(label_B)), probability_B, (answer_B == label_B).float())
        for row, values_B in enumerate(rows):
            self.bins_3B[row] += torch.bincount(bin_B, values_B.double(), minlength=BINS).numpy()

    @property
    def calibration_error(self) -> float:
        """Return the expected calibration error: mean gap of probability and share of right answers over all answers
        (Guo and others, 1706.04599, equation 3), in 0..1; NaN without answers."""
        count_B, probability_B, right_B = self.bins_3B
        return float(np.abs(probability_B - right_B).sum() / count_B.sum()) if count_B.sum() else float("nan")

    def parts(self, names: Sequence[str]) -> list[Part]:
        """Return confusion and calibration for a page, by the names of the classes; nothing without answers."""
        total = int(self.counts_CC.sum())
        return [self._confusion(names), self._calibration(total)] if total else []

    def _confusion(self, names: Sequence[str]) -> Part:
        if len(names) > MOST_CLASSES:
            return self._commonest(names)
        right = float(np.trace(self.counts_CC) / self.counts_CC.sum())
        wrong_CC = self.counts_CC - np.diag(np.diag(self.counts_CC))
        true, answer = divmod(int(wrong_CC.argmax()), len(names))
        most = f"; most often {names[true]} is taken for {names[answer]}, {wrong_CC[true, answer]} times"
        summary = f"{100 * right:.1f} % lie on the diagonal{most if wrong_CC.any() else ''}."
        values = tuple(tuple(100 * float(v) for v in row) for row in shares(self.counts_CC))
        own = tuple(names)
        return HeatmapChart("Confusion", summary, "true class", "answer", own, own, values, "share of the class, %")

    def _commonest(self, names: Sequence[str], most: int = 30) -> Table:
        wrong_CC = self.counts_CC - np.diag(np.diag(self.counts_CC))
        order = np.argsort(-wrong_CC, axis=None, kind="stable")[:most]
        pairs = [divmod(int(i), len(names)) for i in order if wrong_CC.flat[i]]
        rows = tuple((names[true], names[answer], str(wrong_CC[true, answer])) for true, answer in pairs)
        return Table("The commonest confusions", ("true class", "answer", "times"), rows)

    def _calibration(self, total: int) -> LineChart:
        count_B, probability_B, right_B = (row[self.bins_3B[0] > 0] for row in self.bins_3B)
        error = 100 * self.calibration_error
        line = Line("test", tuple(100 * probability_B / count_B), tuple(100 * right_B / count_B))
        summary = (
            f"Share of right answers by their probability, {total:,} answers; expected calibration error {error:.2f} %."
        )
        return LineChart("Calibration", summary, "mean probability, %", "right, %", (line,), diagonal=True)
