"""A binary task, which is the base of the other kinds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from apps.recsys.binary_metrics import TaskMetrics, auc_values, task_metrics
from apps.recsys.encoding.features import Target
from apps.recsys.value_metrics import ValueMetrics

Metrics = TaskMetrics | ValueMetrics

SHARE: dict[str, Any] = {"type": "number", "minimum": 0, "maximum": 1}
"""JSON schema of a probability."""
NUMBER: dict[str, Any] = {"type": "number"}


class Kind:
    """A binary task, and the base of the others.

    Args:
        target: the task's target, as found in the training split.

    Attributes:
        width: number of outputs.
        main_metric: name of the metric that represents the task.
        column, schema: the first word of the name of a prediction's column, and its JSON schema.
    """

    width = 1
    main_metric = "auc"
    column, schema = "probability", SHARE

    def __init__(self, target: Target) -> None:
        self.target = target

    def start(self, positives: float) -> list[float]:
        """Return the outputs of the best constant prediction, ``width`` numbers.

        Args:
            positives: share of positive labels of a binary task.
        """
        return [logit(positives)]

    def initial_loss(self, positives: float) -> float:
        """Return the loss of the outputs of ``start``, in training."""
        p = min(max(positives, 1e-4), 1 - 1e-4)
        return entropy((p, 1 - p))

    def loss(self, z: Tensor, y_B: Tensor) -> Tensor:
        """Return the loss of each example, (..., B). A label is never NaN here."""
        z = z.squeeze(-1)
        return F.binary_cross_entropy_with_logits(z, y_B.expand_as(z), reduction="none")

    def divergence(self, z: Tensor, teacher_Bw: Tensor, temperature: float) -> Tensor:
        """Return how far the prediction is from a teacher's, (..., B); 0 if they are equal."""
        z, given = z.squeeze(-1) / temperature, teacher_Bw.squeeze(-1) / temperature
        yes, no = (p.sigmoid() * (F.logsigmoid(p) - F.logsigmoid(q)) for p, q in ((given, z), (-given, -z)))
        return yes + no

    def mean(self, z_MBw: Tensor) -> Tensor:
        """Return the outputs (B, width) that represent the mean over M of the predictions."""
        return F.logsigmoid(z_MBw).logsumexp(0) - F.logsigmoid(-z_MBw).logsumexp(0)

    def blended(self, z_Bw: Tensor, other_Bw: Tensor, weight: float) -> Tensor:
        """Return the outputs whose prediction is ``weight`` times that of ``z_Bw`` plus ``1 - weight`` times the
        other's: probabilities are mixed, and the values of numbers.

        Args:
            z_Bw, other_Bw: outputs, float64 on the CPU.
            weight: a number in [0, 1].
        """
        p = weight * z_Bw.sigmoid() + (1 - weight) * other_Bw.sigmoid()
        return p.clamp(1e-15, 1 - 1e-15).logit()

    def value(self, z_Bw: Tensor) -> Tensor:
        """Return the prediction as a number, (B,): the probability of a positive label, or the label expected."""
        return z_Bw.squeeze(-1).sigmoid()

    def columns(self, name: str, z_Bw: Tensor) -> dict[str, Tensor | list[str]]:
        """Return the prediction of a task by column, B values each."""
        return {f"{self.column}_{name}": self.value(z_Bw)}

    def schemas(self, name: str) -> dict[str, Any]:
        """Return the JSON schema of each column of ``columns``."""
        return {f"{self.column}_{name}": self.schema}

    def shown(self, name: str, row: Mapping[str, Any]) -> float | str:
        """Return a row of ``columns`` as a page shows it: a probability as a number, anything else as text."""
        return float(row[f"probability_{name}"])

    def label_values(self, y_B: Tensor) -> list[Any]:
        """Return labels as a table has them, B values; None for no label."""
        return [None if math.isnan(label) else int(label) for label in y_B.tolist()]

    def metrics(self, z_Nw: np.ndarray, label_N: np.ndarray, groups_N: np.ndarray | None = None) -> Metrics:
        """Return the metrics of a split.

        Args:
            z_Nw: outputs of all examples.
            label_N: labels; NaN for none.
            groups_N: int64, the user of each example; None if none is known.
        """
        return task_metrics(z_Nw[:, 0], label_N, groups_N)

    def example_values(self, z_Nw: np.ndarray, label_N: np.ndarray) -> np.ndarray:
        """Return values (N,) whose mean is the task's ``main_metric``; NaN if a split cannot determine it."""
        return auc_values(z_Nw[:, 0], label_N)


def logit(p: float) -> float:
    p = min(max(p, 1e-4), 1 - 1e-4)
    return math.log(p / (1 - p))


def entropy(shares: Sequence[float]) -> float:
    return -sum(p * math.log(p) for p in shares if p > 0)
