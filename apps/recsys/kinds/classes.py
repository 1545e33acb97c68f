"""Tasks of levels in order, and of unordered classes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from apps.recsys.encoding.features import Target
from apps.recsys.kinds.binary import NUMBER, SHARE, Kind, Metrics, entropy, logit
from apps.recsys.kinds.numbers import Regression
from apps.recsys.value_metrics import class_metrics, class_values, number_metrics, number_values


class Ordinal(Kind):
    """One of L levels in order, by L - 1 outputs.

    The logit of "above level l" is ``c_1 = z_1`` and ``c_l = c_(l-1) - softplus(z_l)``, so that these probabilities
    fall from level to level; the loss is the cross-entropy of the L levels' probabilities, their differences.
    """

    main_metric = "r2"
    column, schema = "value", NUMBER

    def __init__(self, target: Target) -> None:
        super().__init__(target)
        self.width = len(target.levels) - 1

    def start(self, positives: float) -> list[float]:
        above = [sum(self.target.shares[level + 1 :]) for level in range(self.width)]
        logits = [logit(p) for p in above]
        steps = [max(before - after, 1e-3) for before, after in itertools.pairwise(logits)]
        return [logits[0], *(math.log(math.expm1(step)) for step in steps)]  # the inverse of softplus

    def initial_loss(self, positives: float) -> float:
        return entropy(self.target.shares)

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

    def blended(self, z_Bw: Tensor, other_Bw: Tensor, weight: float) -> Tensor:
        own, other = (self.log_probabilities(z).exp() for z in (z_Bw, other_Bw))
        return self.outputs_of(weight * own + (1 - weight) * other)

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
        return entropy(self.target.shares)

    def loss(self, z: Tensor, y_B: Tensor) -> Tensor:
        return _cross_entropy(F.log_softmax(z, dim=-1), y_B)

    def divergence(self, z: Tensor, teacher_Bw: Tensor, temperature: float) -> Tensor:
        return _kl(F.log_softmax(teacher_Bw / temperature, dim=-1), F.log_softmax(z / temperature, dim=-1))

    def mean(self, z_MBw: Tensor) -> Tensor:
        return F.log_softmax(z_MBw, dim=-1).logsumexp(0) - math.log(len(z_MBw))

    def blended(self, z_Bw: Tensor, other_Bw: Tensor, weight: float) -> Tensor:
        return (weight * z_Bw.softmax(-1) + (1 - weight) * other_Bw.softmax(-1)).clamp_min(1e-30).log()

    def value(self, z_Bw: Tensor) -> Tensor:
        """Return the place of the likeliest class."""
        return z_Bw.argmax(-1).to(z_Bw.dtype)

    def columns(self, name: str, z_Bw: Tensor) -> dict[str, Tensor | list[str]]:
        """Return the likeliest class and its probability."""
        likeliest = [self.target.classes[place] for place in z_Bw.argmax(-1).tolist()]
        return {f"value_{name}": likeliest, f"probability_{name}": z_Bw.softmax(-1).amax(-1)}

    def schemas(self, name: str) -> dict[str, Any]:
        return {f"value_{name}": {"enum": list(self.target.classes)}, f"probability_{name}": SHARE}

    def shown(self, name: str, row: Mapping[str, Any]) -> float | str:
        return f"{row[f'value_{name}']} ({100 * float(row[f'probability_{name}']):.1f} %)"

    def metrics(self, z_Nw: np.ndarray, label_N: np.ndarray, groups_N: np.ndarray | None = None) -> Metrics:
        return class_metrics(z_Nw, label_N)

    def example_values(self, z_Nw: np.ndarray, label_N: np.ndarray) -> np.ndarray:
        return class_values(z_Nw, label_N)

    def label_values(self, y_B: Tensor) -> list[Any]:
        return [None if math.isnan(place) else self.target.classes[int(place)] for place in y_B.tolist()]


def _cross_entropy(log_p: Tensor, y_B: Tensor) -> Tensor:
    """Return the loss of each example, (..., B), of logarithms of probabilities (..., B, C) and places (B,)."""
    return -log_p.gather(-1, y_B.long().unsqueeze(-1).expand(*log_p.shape[:-1], 1)).squeeze(-1)


def _kl(given: Tensor, own: Tensor) -> Tensor:
    """Return the divergence of ``own`` from ``given``, logarithms of probabilities (..., C), (...,)."""
    return (given.exp() * (given - own)).sum(-1)
