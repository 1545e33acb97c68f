"""Tasks of numbers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from apps.recsys.kinds.binary import NUMBER, SHARE, Kind, Metrics, entropy, logit
from apps.recsys.value_metrics import AMOUNTS, QUANTILES, number_metrics, number_values


class Regression(Kind):
    """A number, ``value = mean + std z``; the loss is ``(z - (y - mean) / std)^2``, or the absolute difference.

    Where no training label is negative, no prediction is. The kinds whose value is an exponential predict no more than
    the largest training label.
    """

    main_metric = "r2"
    column, schema = "value", NUMBER
    further: tuple[str, ...] = ()
    """Metrics in addition to those of all numbers."""

    @property
    def is_positive(self) -> bool:
        """Whether no training label is negative."""
        return self.target.least is not None and self.target.least >= 0

    def _at_least(self, value: Tensor) -> Tensor:
        return value.clamp_min(0) if self.is_positive else value

    def _at_most(self, value: Tensor) -> Tensor:
        return value if self.target.most is None else value.clamp_max(self.target.most)

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
        return self._at_least(self.target.mean + self.target.std * z_Bw.squeeze(-1))

    def blended(self, z_Bw: Tensor, other_Bw: Tensor, weight: float) -> Tensor:
        value_B = weight * self.value(z_Bw) + (1 - weight) * self.value(other_Bw)
        return self.moved(z_Bw, torch.from_numpy(self.outputs_of(value_B.numpy())).reshape(z_Bw.shape), value_B)

    def moved(self, z_Bw: Tensor, of_value_Bw: Tensor, value_B: Tensor) -> Tensor:
        """Return the outputs ``z_Bw`` with another value and their own spread, if they have one.

        Args:
            z_Bw: outputs.
            of_value_Bw: ``outputs_of`` the value.
            value_B: the value.
        """
        return of_value_Bw

    def outputs_of(self, value_N: np.ndarray) -> np.ndarray:
        """Return outputs (N,) or (N, width) whose ``value`` is ``value_N``, as trees predict it."""
        return (value_N - self.target.mean) / self.target.std

    def label_values(self, y_B: Tensor) -> list[Any]:
        # To the digits that float32 keeps: 22.86, and not 22.860000610351562.
        return [None if math.isnan(label) else float(f"{label:.7g}") for label in y_B.tolist()]

    def metrics(self, z_Nw: np.ndarray, label_N: np.ndarray, groups_N: np.ndarray | None = None) -> Metrics:
        return number_metrics(self.value(torch.from_numpy(z_Nw)).numpy(), label_N, further=self.further)

    def example_values(self, z_Nw: np.ndarray, label_N: np.ndarray) -> np.ndarray:
        return number_values(self.value(torch.from_numpy(z_Nw)).numpy(), label_N)

    def shown(self, name: str, row: Mapping[str, Any]) -> float | str:
        return f"{float(row[f'value_{name}']):.4g}"


class Count(Regression):
    """A number of at least 0, ``value = mean exp(z)``; the loss is Poisson's, ``exp(z) - y z / mean``."""

    further = AMOUNTS

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
        return self._at_most(self.target.mean * z_Bw.squeeze(-1).exp())

    def outputs_of(self, value_N: np.ndarray) -> np.ndarray:
        return np.log(np.maximum(value_N, 1e-9) / self.target.mean)


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


class Tweedie(Count):
    """A number of at least 0, ``value = mean exp(z)``; the loss is Tweedie's of power 1.5, ``2 y' exp(-z / 2) +
    2 exp(z / 2)`` with ``y' = y / mean``: many zeros next to amounts whose spread grows with their mean."""

    def initial_loss(self, positives: float) -> float:
        return 4.0

    def loss(self, z: Tensor, y_B: Tensor) -> Tensor:
        half = z.squeeze(-1) / 2
        return 2 * (y_B / self.target.mean * (-half).exp() + half.exp())

    def divergence(self, z: Tensor, teacher_Bw: Tensor, temperature: float) -> Tensor:
        half, given = z.squeeze(-1) / 2, teacher_Bw.squeeze(-1) / 2
        return 2 * ((2 * given - half).exp() + half.exp()) - 4 * given.exp()


class Revenue(Regression):
    """An amount that is often 0, as a zero-inflated lognormal distribution (arXiv 1912.07753).

    The outputs are the logit of a positive amount, and mean and spread of its logarithm in units of the positive
    training labels': ``mu = log_mean + log_std z_1`` and ``sigma = log_std s``, where ``s = softplus(z_2 + c)`` is 1 at
    ``z_2 = 0`` and at most 3. The value is ``p exp(mu + sigma^2 / 2)``; the loss is the cross-entropy of being positive
    and, of positive amounts, the negative log likelihood of their logarithm.
    """

    width = 3
    further = (*AMOUNTS, "auc_positive")
    _SHIFT = math.log(math.e - 1)

    def start(self, positives: float) -> list[float]:
        return [logit(self.target.shares[1]), 0.0, 0.0]

    def initial_loss(self, positives: float) -> float:
        return entropy(self.target.shares) + self.target.shares[1] * (0.5 + 0.5 * math.log(2 * math.pi))

    def _parts(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the logit, and the standardized mean and spread of the logarithm."""
        return z[..., 0], z[..., 1], F.softplus(z[..., 2] + self._SHIFT).clamp(0.05, 3.0)

    def loss(self, z: Tensor, y_B: Tensor) -> Tensor:
        chance, mean, spread = self._parts(z)
        is_positive_B = (y_B > 0).to(z.dtype)
        log_B = (y_B.clamp_min(1e-30).log() - self.target.log_mean) / self.target.log_std
        own = 0.5 * ((log_B - mean) / spread).square() + spread.log() + 0.5 * math.log(2 * math.pi)
        cross = F.binary_cross_entropy_with_logits(chance, is_positive_B.expand_as(chance), reduction="none")
        return cross + torch.where(is_positive_B > 0, own, 0.0)

    def divergence(self, z: Tensor, teacher_Bw: Tensor, temperature: float) -> Tensor:
        (chance, mean, spread), (given, there, wide) = self._parts(z), self._parts(teacher_Bw)
        of_chance = super(Regression, self).divergence(chance[..., None], given[..., None], 1.0)
        of_amount = (spread / wide).log() + (wide.square() + (there - mean).square()) / (2 * spread.square()) - 0.5
        return of_chance + given.sigmoid() * of_amount

    def mean(self, z_MBw: Tensor) -> Tensor:
        """Return the distribution with the members' mean chance, and mean and variance of the positive amounts."""
        chance, mean, spread = self._parts(z_MBw.double())
        scale = self.target.log_std
        share = chance.sigmoid() / chance.sigmoid().sum(0)
        first, second = (k * scale * mean + (k * scale * spread).square() / 2 + share.log() for k in (1, 2))
        log_first, log_second = first.logsumexp(0), second.logsumexp(0)
        wide = (log_second - 2 * log_first).clamp_min(1e-12)
        own = torch.stack((chance.sigmoid().mean(0).logit(), (log_first - wide / 2) / scale, wide.sqrt() / scale), -1)
        own[..., 2] = torch.expm1(own[..., 2].clamp(0.05, 3.0)).log() - self._SHIFT
        return own.to(z_MBw.dtype)

    def value(self, z_Bw: Tensor) -> Tensor:
        chance, mean, spread = self._parts(z_Bw)
        scale = self.target.log_std
        amount = (self.target.log_mean + scale * mean + (scale * spread).square() / 2).exp()
        return chance.sigmoid() * self._at_most(amount)

    def quantile(self, z_Bw: Tensor, level: float) -> Tensor:
        """Return a quantile of the amount, (B,); 0 below the chance of 0."""
        chance, mean, spread = self._parts(z_Bw)
        p = chance.sigmoid()
        place = ((level - (1 - p)) / p).clamp(1e-6, 1 - 1e-6)
        amount = (self.target.log_mean + self.target.log_std * (mean + spread * torch.special.ndtri(place))).exp()
        return torch.where(level > 1 - p, self._at_most(amount), 0.0)

    def columns(self, name: str, z_Bw: Tensor) -> dict[str, Tensor | list[str]]:
        quantiles = {f"quantile_{100 * q:.0f}_{name}": self.quantile(z_Bw, q) for q in QUANTILES}
        return {f"value_{name}": self.value(z_Bw), f"probability_{name}": z_Bw[:, 0].sigmoid(), **quantiles}

    def schemas(self, name: str) -> dict[str, Any]:
        quantiles = {f"quantile_{100 * q:.0f}_{name}": NUMBER for q in QUANTILES}
        return {f"value_{name}": NUMBER, f"probability_{name}": SHARE, **quantiles}

    def outputs_of(self, value_N: np.ndarray) -> np.ndarray:
        """Return outputs with the least spread, and a chance that rises with the value from the training's share of
        positive amounts to 1 at the largest, so that no amount is above that."""
        spread, scale, share = 0.05, self.target.log_std, self.target.shares[1]
        most = math.inf if self.target.most is None else self.target.most
        value_N = np.clip(value_N.astype(np.float64), 1e-9, most)
        share_N = np.minimum(share + (1 - share) * value_N / most, 1 - 1e-9)
        mean_N = (np.log(value_N / share_N) - (spread * scale) ** 2 / 2 - self.target.log_mean) / scale
        raw = math.log(math.expm1(spread)) - self._SHIFT
        return np.column_stack((np.log(share_N / (1 - share_N)), mean_N, np.full(len(mean_N), raw)))

    def moved(self, z_Bw: Tensor, of_value_Bw: Tensor, value_B: Tensor) -> Tensor:
        """Return ``z_Bw`` with the mean of the logarithm that gives the value, and a greater chance of an amount where
        no amount up to the largest would give it."""
        value_B, (chance, _, spread) = value_B.clamp_min(1e-9), self._parts(z_Bw)
        least_B = value_B / (math.inf if self.target.most is None else self.target.most)
        chance_B = torch.maximum(chance.sigmoid(), least_B).clamp(1e-9, 1 - 1e-9)
        scale = self.target.log_std
        mean_B = ((value_B / chance_B).log() - (scale * spread).square() / 2 - self.target.log_mean) / scale
        return torch.stack((chance_B.logit(), mean_B, z_Bw[..., 2]), -1)

    def metrics(self, z_Nw: np.ndarray, label_N: np.ndarray, groups_N: np.ndarray | None = None) -> Metrics:
        value_N = self.value(torch.from_numpy(z_Nw)).numpy()
        return number_metrics(value_N, label_N, further=self.further, chance_N=z_Nw[:, 0])


class Quantile(Regression):
    """A number by its quantiles at ``QUANTILES``, of which the middle one is the value; the loss is the pinball loss of
    all, in standard deviations. The outer ones lie ``softplus`` of an output away, so that none cross."""

    width = 3
    further = ("pinball", "coverage_80")
    _OUTER = 1.2816  # standard deviations from the middle of a normal distribution to its quantile at 0.9

    def start(self, positives: float) -> list[float]:
        return [0.0, math.log(math.expm1(self._OUTER)), math.log(math.expm1(self._OUTER))]

    def initial_loss(self, positives: float) -> float:
        # Of a normal distribution, the loss at level q is the density at the quantile.
        return sum(math.exp(-(x**2) / 2) / math.sqrt(2 * math.pi) for x in (0.0, self._OUTER, self._OUTER))

    def _levels(self, z: Tensor) -> Tensor:
        """Return the standardized quantiles, (..., 3)."""
        middle = z[..., 0]
        return torch.stack((middle - F.softplus(z[..., 1]), middle, middle + F.softplus(z[..., 2])), -1)

    def loss(self, z: Tensor, y_B: Tensor) -> Tensor:
        error = ((y_B - self.target.mean) / self.target.std)[..., None] - self._levels(z)
        level = error.new_tensor(QUANTILES)
        return torch.maximum(level * error, (level - 1) * error).sum(-1)

    def divergence(self, z: Tensor, teacher_Bw: Tensor, temperature: float) -> Tensor:
        return (self._levels(z) - self._levels(teacher_Bw)).abs().sum(-1)

    def mean(self, z_MBw: Tensor) -> Tensor:
        low, middle, high = self._levels(z_MBw).mean(0).unbind(-1)
        outer = [torch.expm1((far - near).clamp_min(1e-6)).log() for far, near in ((middle, low), (high, middle))]
        return torch.stack((middle, *outer), -1)

    def quantiles(self, z_Bw: Tensor) -> Tensor:
        """Return the quantiles, (B, 3)."""
        return self._at_least(self.target.mean + self.target.std * self._levels(z_Bw))

    def value(self, z_Bw: Tensor) -> Tensor:
        return self.quantiles(z_Bw)[..., 1]

    def columns(self, name: str, z_Bw: Tensor) -> dict[str, Tensor | list[str]]:
        low, middle, high = self.quantiles(z_Bw).unbind(-1)
        return {f"value_{name}": middle, f"quantile_10_{name}": low, f"quantile_90_{name}": high}

    def schemas(self, name: str) -> dict[str, Any]:
        return dict.fromkeys((f"value_{name}", f"quantile_10_{name}", f"quantile_90_{name}"), NUMBER)

    def outputs_of(self, value_N: np.ndarray) -> np.ndarray:
        middle_N = super().outputs_of(value_N)
        return np.column_stack((middle_N, *(np.full(len(middle_N), z) for z in self.start(0.5)[1:])))

    def moved(self, z_Bw: Tensor, of_value_Bw: Tensor, value_B: Tensor) -> Tensor:
        """Return ``z_Bw`` with the middle quantile at the value, and the outer ones as far away as they were."""
        return torch.cat((of_value_Bw[..., :1], z_Bw[..., 1:]), -1)

    def metrics(self, z_Nw: np.ndarray, label_N: np.ndarray, groups_N: np.ndarray | None = None) -> Metrics:
        quantile_N3 = self.quantiles(torch.from_numpy(z_Nw)).numpy()
        return number_metrics(quantile_N3[:, 1], label_N, further=self.further, quantile_N3=quantile_N3)
