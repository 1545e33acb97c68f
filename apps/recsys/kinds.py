"""Kinds of tasks: how many outputs a task has, where they start, and their loss and prediction.

The outputs z of a task are float32 (..., B, width), and its labels y (B,), as ``TableBatch`` has them. The losses of
numbers are in units of the training labels' standard deviation or mean, so that a task of prices and one of clicks
weigh alike.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from apps.recsys.binary_metrics import TaskMetrics, auc_values, task_metrics
from apps.recsys.encoding.features import Target
from apps.recsys.value_metrics import ValueMetrics, class_metrics, class_values, number_metrics, number_values

Metrics = TaskMetrics | ValueMetrics


_SHARE: dict[str, Any] = {"type": "number", "minimum": 0, "maximum": 1}
"""JSON schema of a probability."""
_NUMBER: dict[str, Any] = {"type": "number"}


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
    column, schema = "probability", _SHARE

    def __init__(self, target: Target) -> None:
        self.target = target

    def start(self, positives: float) -> list[float]:
        """Return the outputs of the best constant prediction, ``width`` numbers.

        Args:
            positives: share of positive labels of a binary task.
        """
        return [_logit(positives)]

    def initial_loss(self, positives: float) -> float:
        """Return the loss of the outputs of ``start``, in training."""
        p = min(max(positives, 1e-4), 1 - 1e-4)
        return _entropy((p, 1 - p))

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


class Regression(Kind):
    """A number, ``value = mean + std z``; the loss is ``(z - (y - mean) / std)^2``, or the absolute difference."""

    main_metric = "r2"
    column, schema = "value", _NUMBER

    def start(self, positives: float) -> list[float]:
        return [0.0]

    def initial_loss(self, positives: float) -> float:
        return 1.0 if self.target.loss == "squared" else math.sqrt(2 / math.pi)  # the latter of a normal distribution

    def loss(self, z: Tensor, y_B: Tensor) -> Tensor:
        difference = z.squeeze(-1) - (y_B - self.target.mean) / self.target.std
        return difference.square() if self.target.loss == "squared" else difference.abs()

    def divergence(self, z: Tensor, teacher_Bw: Tensor, temperature: float) -> Tensor:
        difference = (z - teacher_Bw).squeeze(-1)
        return difference.square() if self.target.loss == "squared" else difference.abs()

    def mean(self, z_MBw: Tensor) -> Tensor:
        return z_MBw.mean(0)

    def value(self, z_Bw: Tensor) -> Tensor:
        return self.target.mean + self.target.std * z_Bw.squeeze(-1)

    def label_values(self, y_B: Tensor) -> list[Any]:
        # To the digits that float32 keeps: 22.86, and not 22.860000610351562.
        return [None if math.isnan(label) else float(f"{label:.7g}") for label in y_B.tolist()]

    def metrics(self, z_Nw: np.ndarray, label_N: np.ndarray, groups_N: np.ndarray | None = None) -> Metrics:
        return number_metrics(self.value(torch.from_numpy(z_Nw)).numpy(), label_N)

    def example_values(self, z_Nw: np.ndarray, label_N: np.ndarray) -> np.ndarray:
        return number_values(self.value(torch.from_numpy(z_Nw)).numpy(), label_N)

    def shown(self, name: str, row: Mapping[str, Any]) -> float | str:
        return f"{float(row[f'value_{name}']):.4g}"


class Count(Regression):
    """A number of at least 0, ``value = mean exp(z)``; the loss is Poisson's, ``exp(z) - y z / mean``."""

    def initial_loss(self, positives: float) -> float:
        return 1.0

    def loss(self, z: Tensor, y_B: Tensor) -> Tensor:
        z = z.squeeze(-1)
        return z.exp() - y_B / self.target.mean * z

    def divergence(self, z: Tensor, teacher_Bw: Tensor, temperature: float) -> Tensor:
        z, given = z.squeeze(-1), teacher_Bw.squeeze(-1)
        return given.exp() * (given - z) - given.exp() + z.exp()

    def mean(self, z_MBw: Tensor) -> Tensor:
        return z_MBw.logsumexp(0) - math.log(len(z_MBw))

    def value(self, z_Bw: Tensor) -> Tensor:
        return self.target.mean * z_Bw.squeeze(-1).exp()


class WeightedLogistic(Count):
    """A number of at least 0 as the odds of a logistic regression, ``value = mean exp(z)``.

    Each example is a negative of weight 1 and a positive of weight y / mean (Covington et al., RecSys 2016, section
    4.2): the loss is ``(y / mean) softplus(-z) + softplus(z)``, least where ``exp(z)`` is the mean of y / mean.
    """

    def initial_loss(self, positives: float) -> float:
        return 2 * math.log(2)

    def loss(self, z: Tensor, y_B: Tensor) -> Tensor:
        z = z.squeeze(-1)
        return y_B / self.target.mean * F.softplus(-z) + F.softplus(z)

    def divergence(self, z: Tensor, teacher_Bw: Tensor, temperature: float) -> Tensor:
        z, given = z.squeeze(-1), teacher_Bw.squeeze(-1)
        return given.exp() * (F.softplus(-z) - F.softplus(-given)) + F.softplus(z) - F.softplus(given)


class Ordinal(Kind):
    """One of L levels in order, by L - 1 outputs.

    The logit of "above level l" is ``c_1 = z_1`` and ``c_l = c_(l-1) - softplus(z_l)``, so that these probabilities
    fall from level to level; the loss is the cross-entropy of the L levels' probabilities, their differences.
    """

    main_metric = "r2"
    column, schema = "value", _NUMBER

    def __init__(self, target: Target) -> None:
        super().__init__(target)
        self.width = len(target.levels) - 1

    def start(self, positives: float) -> list[float]:
        above = [sum(self.target.shares[level + 1 :]) for level in range(self.width)]
        logits = [_logit(p) for p in above]
        steps = [max(before - after, 1e-3) for before, after in itertools.pairwise(logits)]
        return [logits[0], *(math.log(math.expm1(step)) for step in steps)]  # the inverse of softplus

    def initial_loss(self, positives: float) -> float:
        return _entropy(self.target.shares)

    def log_probabilities(self, z: Tensor) -> Tensor:
        """Return the logarithm of each level's probability, (..., B, L)."""
        steps = F.softplus(z[..., 1:])
        above = torch.cat((z[..., :1], z[..., :1] - steps.cumsum(-1)), dim=-1)
        # sigmoid(a) - sigmoid(b) = sigmoid(a) sigmoid(-b) (1 - exp(b - a)), which no rounding makes 0.
        between = F.logsigmoid(above[..., :-1]) + F.logsigmoid(-above[..., 1:]) + torch.log(-torch.expm1(-steps))
        return torch.cat((F.logsigmoid(-above[..., :1]), between, F.logsigmoid(above[..., -1:])), dim=-1)

    def loss(self, z: Tensor, y_B: Tensor) -> Tensor:
        return _cross_entropy(self.log_probabilities(z), y_B)

    def divergence(self, z: Tensor, teacher_Bw: Tensor, temperature: float) -> Tensor:
        return _kl(self.log_probabilities(teacher_Bw), self.log_probabilities(z))

    def mean(self, z_MBw: Tensor) -> Tensor:
        return self.outputs_of((self.log_probabilities(z_MBw).logsumexp(0) - math.log(len(z_MBw))).exp())

    def outputs_of(self, p_BL: Tensor) -> Tensor:
        """Return the outputs (B, L - 1) whose probabilities of the levels are ``p_BL``."""
        above_BW = p_BL.flip(-1).cumsum(-1).flip(-1)[:, 1:]
        logit_BW = above_BW.double().clamp(1e-12, 1 - 1e-12).logit()
        steps = (logit_BW[:, :-1] - logit_BW[:, 1:]).clamp_min(1e-6)
        return torch.cat((logit_BW[:, :1], steps.expm1().log()), dim=1).to(p_BL.dtype)

    def value(self, z_Bw: Tensor) -> Tensor:
        return self.log_probabilities(z_Bw).exp() @ z_Bw.new_tensor(self.target.levels)

    shown = Regression.shown  # type: ignore[assignment]

    def label_values(self, y_B: Tensor) -> list[Any]:
        return [None if math.isnan(level) else self.target.levels[int(level)] for level in y_B.tolist()]

    def metrics(self, z_Nw: np.ndarray, label_N: np.ndarray, groups_N: np.ndarray | None = None) -> Metrics:
        z, numbers_N = torch.from_numpy(z_Nw), self.target.numbers_of(label_N)
        return number_metrics(self.value(z).numpy(), numbers_N, self.log_probabilities(z).numpy(), label_N)

    def example_values(self, z_Nw: np.ndarray, label_N: np.ndarray) -> np.ndarray:
        return number_values(self.value(torch.from_numpy(z_Nw)).numpy(), self.target.numbers_of(label_N))


class Multiclass(Kind):
    """One of C classes, by C logits."""

    def __init__(self, target: Target) -> None:
        super().__init__(target)
        self.width = len(target.classes)

    def start(self, positives: float) -> list[float]:
        return [math.log(max(share, 1e-4)) for share in self.target.shares]

    def initial_loss(self, positives: float) -> float:
        return _entropy(self.target.shares)

    def loss(self, z: Tensor, y_B: Tensor) -> Tensor:
        return _cross_entropy(F.log_softmax(z, dim=-1), y_B)

    def divergence(self, z: Tensor, teacher_Bw: Tensor, temperature: float) -> Tensor:
        return _kl(F.log_softmax(teacher_Bw / temperature, dim=-1), F.log_softmax(z / temperature, dim=-1))

    def mean(self, z_MBw: Tensor) -> Tensor:
        return F.log_softmax(z_MBw, dim=-1).logsumexp(0) - math.log(len(z_MBw))

    def value(self, z_Bw: Tensor) -> Tensor:
        """Return the place of the likeliest class."""
        return z_Bw.argmax(-1).to(z_Bw.dtype)

    def columns(self, name: str, z_Bw: Tensor) -> dict[str, Tensor | list[str]]:
        """Return the likeliest class and its probability."""
        likeliest = [self.target.classes[place] for place in z_Bw.argmax(-1).tolist()]
        return {f"value_{name}": likeliest, f"probability_{name}": z_Bw.softmax(-1).amax(-1)}

    def schemas(self, name: str) -> dict[str, Any]:
        return {f"value_{name}": {"enum": list(self.target.classes)}, f"probability_{name}": _SHARE}

    def shown(self, name: str, row: Mapping[str, Any]) -> float | str:
        return f"{row[f'value_{name}']} ({100 * float(row[f'probability_{name}']):.1f} %)"

    def metrics(self, z_Nw: np.ndarray, label_N: np.ndarray, groups_N: np.ndarray | None = None) -> Metrics:
        return class_metrics(z_Nw, label_N)

    def example_values(self, z_Nw: np.ndarray, label_N: np.ndarray) -> np.ndarray:
        return class_values(z_Nw, label_N)

    def label_values(self, y_B: Tensor) -> list[Any]:
        return [None if math.isnan(place) else self.target.classes[int(place)] for place in y_B.tolist()]


def kind_of(target: Target) -> Kind:
    """Return the kind of a task."""
    if target.kind == "regression" and target.loss == "weighted_logistic":
        return WeightedLogistic(target)
    kinds = {"binary": Kind, "regression": Regression, "count": Count, "ordinal": Ordinal, "multiclass": Multiclass}
    return kinds[target.kind](target)


class Outputs:
    """Where the outputs of each task are side by side.

    Args:
        targets: the target of each task.

    Attributes:
        kinds: the kind of each task.
        width: number Z of all outputs.
        all_binary: whether the outputs are one logit a task.
        main_metric: the metric that all tasks share, "auc" or "r2"; None if they differ.
    """

    def __init__(self, targets: Sequence[Target]) -> None:
        self.kinds = [kind_of(target) for target in targets]
        self.width = sum(kind.width for kind in self.kinds)
        self.all_binary = all(target.kind == "binary" for target in targets)
        names = {kind.main_metric for kind in self.kinds}
        self.main_metric = names.pop() if len(names) == 1 else None

    def split(self, z: Tensor) -> tuple[Tensor, ...]:
        """Return each task's outputs (..., width) of all (..., Z)."""
        return z.split([kind.width for kind in self.kinds], dim=-1)

    def shifted(self, z: Tensor, offset_Bt: Tensor) -> Tensor:
        """Return outputs (..., B, Z) with a number added to all outputs of each example and task."""
        widths = torch.tensor([kind.width for kind in self.kinds], device=offset_Bt.device)
        return z + offset_Bt.repeat_interleave(widths, dim=-1, output_size=self.width)

    def losses(self, z: Tensor, label_Bt: Tensor) -> Tensor:
        """Return the loss of each example and task, (..., B, t); any number where a label is NaN."""
        if self.all_binary:
            target = label_Bt.nan_to_num(0.0).expand_as(z)
            return F.binary_cross_entropy_with_logits(z, target, reduction="none")
        parts = zip(self.kinds, self.split(z), label_Bt.nan_to_num(0.0).unbind(-1), strict=True)
        return torch.stack([kind.loss(own, y_B) for kind, own, y_B in parts], dim=-1)

    def divergences(self, z: Tensor, teacher_BZ: Tensor, temperature: float) -> Tensor:
        """Return how far each task's prediction is from a teacher's, (..., B, t)."""
        parts = zip(self.kinds, self.split(z), self.split(teacher_BZ), strict=True)
        return torch.stack([kind.divergence(own, given, temperature) for kind, own, given in parts], dim=-1)

    def mean(self, z_MBZ: Tensor) -> Tensor:
        """Return the outputs (B, Z) that represent the mean of the members' predictions."""
        return torch.cat([kind.mean(own) for kind, own in zip(self.kinds, self.split(z_MBZ), strict=True)], dim=-1)

    def columns(self, names: Sequence[str], z_BZ: Tensor) -> dict[str, Tensor | list[str]]:
        """Return the predictions of all tasks by column, B values each."""
        parts = zip(names, self.kinds, self.split(z_BZ), strict=True)
        return {column: values for name, kind, own in parts for column, values in kind.columns(name, own).items()}


def _logit(p: float) -> float:
    p = min(max(p, 1e-4), 1 - 1e-4)
    return math.log(p / (1 - p))


def _cross_entropy(log_p: Tensor, y_B: Tensor) -> Tensor:
    """Return the loss of each example, (..., B), of logarithms of probabilities (..., B, C) and places (B,)."""
    return -log_p.gather(-1, y_B.long().unsqueeze(-1).expand(*log_p.shape[:-1], 1)).squeeze(-1)


def _kl(given: Tensor, own: Tensor) -> Tensor:
    """Return the divergence of ``own`` from ``given``, logarithms of probabilities (..., C), (...,)."""
    return (given.exp() * (given - own)).sum(-1)


def _entropy(shares: Sequence[float]) -> float:
    return -sum(p * math.log(p) for p in shares if p > 0)
