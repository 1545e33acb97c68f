"""Loss against training FLOPs: ``loss = floor + scale * FLOPs ** -exponent`` for several kinds of models together, with
one floor, and what follows from it with 95 % intervals.

Noise is relative. That of a point, the mean of a rung's seeds, comes from the seeds' spread, pooled over all points,
and from the distance of the points to the fit; an F test at 25 % tells whether the fit misses more than seeds explain,
and then that distance counts. Intervals are quantiles of ``DRAWS`` fits to redrawn points: a parametric bootstrap whose
variance is drawn too, as few degrees of freedom demand. Examples of the test are drawn with replacement by blocks.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

DRAWS = 1000
FLOORS = np.concatenate([[0.0], 1 - np.geomspace(1.0, 0.02, 81)[1:]])
"""Floors that a fit tries, as shares of the lowest loss."""


@dataclass(frozen=True)
class Measured:
    """Test losses of one kind of model on one rung.

    Attributes:
        flops: training FLOPs of a run.
        seconds: training time of a run.
        loss_SB: loss of each seed (S) on each block of test examples (B), above 0.
        weight_B: shares of the blocks in the loss, whose sum is 1.
    """

    flops: float
    seconds: float
    loss_SB: np.ndarray
    weight_B: np.ndarray

    @property
    def loss_S(self) -> np.ndarray:
        return self.loss_SB @ self.weight_B


Rungs = Sequence[Mapping[str, Measured]]
"""The kinds of models on each rung, by rising budget."""


@dataclass(frozen=True)
class Span:
    """An estimate with the ends of its 95 % interval."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, value: float, draws: np.ndarray) -> Span:
        low, high = np.quantile(draws, [0.025, 0.975])
        return cls(float(value), float(low), float(high))

    def holds(self, value: float) -> bool:
        return self.low <= value <= self.high


@dataclass(frozen=True)
class Curves:
    """Fitted curves of K kinds, D at a time.

    Attributes:
        kinds: names of the kinds.
        unit: FLOPs by which FLOPs are divided.
        floor_D: the floors.
        scale_KD: logarithms of the scales, per ``unit``.
        exponent_KD: the exponents.
    """

    kinds: tuple[str, ...]
    unit: float
    floor_D: np.ndarray
    scale_KD: np.ndarray
    exponent_KD: np.ndarray

    def loss_D(self, kind: str, flops: float) -> np.ndarray:
        k = self.kinds.index(kind)
        return self.floor_D + np.exp(self.scale_KD[k] - self.exponent_KD[k] * np.log(flops / self.unit))

    def log_cheaper_D(self, kind: str, other: str, flops: float) -> np.ndarray:
        """Return the logarithm of ``flops`` over the FLOPs at which ``kind`` has the loss of ``other`` at ``flops``."""
        a, b = self.kinds.index(kind), self.kinds.index(other)
        place = np.log(flops / self.unit)
        reached = self.scale_KD[a] - self.scale_KD[b] + self.exponent_KD[b] * place
        return _finite(place - reached / self.exponent_KD[a])

    def log_crossing_D(self, kind: str, other: str) -> np.ndarray:
        """Return the logarithm of the FLOPs at which both have one loss."""
        a, b = self.kinds.index(kind), self.kinds.index(other)
        with np.errstate(divide="ignore", invalid="ignore"):
            place = (self.scale_KD[a] - self.scale_KD[b]) / (self.exponent_KD[a] - self.exponent_KD[b])
        return _finite(np.log(self.unit) + place)


def _finite(logs: np.ndarray) -> np.ndarray:
    """Return logarithms whose exponentials are numbers."""
    return np.clip(np.nan_to_num(logs), -300, 300)


class Fit:
    """The curves of measured rungs.

    With two rungs all kinds share one exponent. The floor is 0 where the data cannot tell it: with two rungs, or where
    its interval reaches 0. Intervals allow for a floor from three rungs on.

    Args:
        rungs: at least two rungs of the same kinds, at least two.
        seed, draws: seed and number of the redrawn points.

    Attributes:
        tells_floor: whether the interval of the floor lies above 0.
        curves: the fitted curves.

    Raises:
        ValueError: fewer rungs or kinds, or a loss that is not positive.
    """

    def __init__(self, rungs: Rungs, seed: int = 0, draws: int = DRAWS) -> None:
        self.rungs, self.kinds, self.seed, self.draws = rungs, tuple(rungs[0]) if rungs else (), seed, draws
        if len(rungs) < 2 or len(self.kinds) < 2:
            raise ValueError(f"curves need two rungs of two kinds of models: got {len(rungs)} of {len(self.kinds)}")
        cells = [[rung[kind] for rung in rungs] for kind in self.kinds]
        loss_KRS = [[np.asarray(c.loss_S, float) for c in row] for row in cells]
        if not all((own > 0).all() for row in loss_KRS for own in row):
            raise ValueError("a curve needs losses above 0")
        self.loss_KR = np.array([[own.mean() for own in row] for row in loss_KRS])
        flops_KR = np.array([[c.flops for c in row] for row in cells])
        self.unit = float(np.exp(np.log(flops_KR).mean()))
        self.x_KR = np.log(flops_KR / self.unit)
        with_floor = self._fit(np.log(self.loss_KR)[None], len(rungs) > 2)
        self._center_DKR = self._fitted_DKR(with_floor)
        self.noise, self.freedom = self._noise(loss_KRS)
        self.tells_floor = len(rungs) > 2 and bool(np.quantile(self._drawn().floor_D, 0.025) > 0)
        self.curves = with_floor if self.tells_floor else self._fit(np.log(self.loss_KR)[None], False)

    @property
    def num_params(self) -> int:
        """Return the number of parameters of ``curves``."""
        K = len(self.kinds)
        return K + 1 if len(self.rungs) == 2 else 2 * K + self.tells_floor

    def _fit(self, y_DKR: np.ndarray, tries_floors: bool) -> Curves:
        """Return the least-squares fits, in logarithms of the loss, of D tables of such logarithms."""
        y_FDKR, floor_F = y_DKR[None], FLOORS if tries_floors else FLOORS[:1]
        floor_FD = floor_F[:, None] * np.exp(y_DKR.min((1, 2)))
        above = np.exp(y_FDKR) - floor_FD[..., None, None]
        weight = (above / np.exp(y_FDKR)) ** 2  # of a relative error of the loss in one of what is above the floor
        logs, x = np.log(above), self.x_KR
        total = weight.sum(-1, keepdims=True)
        x_mean, y_mean = ((weight * v).sum(-1, keepdims=True) / total for v in (x, logs))
        xy = (weight * (x - x_mean) * (logs - y_mean)).sum(-1)
        xx = (weight * (x - x_mean) ** 2).sum(-1)
        slope = xy / xx
        if len(self.rungs) == 2:
            slope = np.broadcast_to(xy.sum(-1, keepdims=True) / xx.sum(-1, keepdims=True), slope.shape)
        scale = y_mean[..., 0] - slope * x_mean[..., 0]
        fitted = np.log(floor_FD[..., None, None] + np.exp(scale[..., None] + slope[..., None] * x))
        best = ((y_FDKR - fitted) ** 2).sum((-2, -1)).argmin(0)
        pick = (best, np.arange(len(best)))
        return Curves(self.kinds, self.unit, floor_FD[pick], scale[pick].T, -slope[pick].T)

    def _noise(self, loss_KRS: list[list[np.ndarray]]) -> tuple[float, int]:
        """Return the relative standard deviation of a point, and its degrees of freedom."""
        from scipy.stats import f

        K, R = self.loss_KR.shape
        missed = np.log(self.loss_KR) - self._center_DKR[0]
        own = K * R - (K + 1 if R == 2 else 2 * K + 1)
        squares, among = float((missed**2).sum()), 0.0
        freedom = 0
        for row in loss_KRS:
            for losses in row:
                among += float(((np.log(losses) - np.log(losses).mean()) ** 2).sum()) / len(losses)
                freedom += len(losses) - 1
        if not freedom:
            return np.sqrt(squares / own), own
        if among == 0 or squares / own / (among / freedom) > f.ppf(0.75, own, freedom):
            return np.sqrt(squares / own), own
        return np.sqrt((squares + among) / (own + freedom)), own + freedom

    def _fitted_DKR(self, curves: Curves) -> np.ndarray:
        above = np.exp(curves.scale_KD.T[..., None] - curves.exponent_KD.T[..., None] * self.x_KR)
        return np.log(curves.floor_D[:, None, None] + above)

    @functools.cache  # noqa: B019  # a fit lives as long as a report
    def _drawn(self, blocks: bool = True) -> Curves:
        """Return fits to redrawn points; with ``blocks``, of other examples too."""
        generator = np.random.default_rng(self.seed)
        y = self._center_DKR + self._scatter(generator)[:, None, None] * generator.standard_normal(
            (self.draws, *self.loss_KR.shape)
        )
        if blocks:
            y = y + self._of_other_examples(generator)
        return self._fit(y, len(self.rungs) > 2)

    def _scatter(self, generator: np.random.Generator) -> np.ndarray:
        """Return a standard deviation for each draw; at most 5, for exponentials that are numbers."""
        return np.minimum(self.noise * np.sqrt(self.freedom / generator.chisquare(self.freedom, self.draws)), 5.0)

    def _of_other_examples(self, generator: np.random.Generator) -> np.ndarray:
        """Return the relative change of each point's loss with as many other blocks of examples; 0 with one block.

        Points with the same blocks take the same ones; rungs may have others, as with another length of their rows.
        """
        drawn: dict[bytes, np.ndarray] = {}
        change = np.zeros((self.draws, *self.loss_KR.shape))
        for k, kind in enumerate(self.kinds):
            for r, rung in enumerate(self.rungs):
                weight_B = rung[kind].weight_B
                key, B = weight_B.round(9).tobytes(), len(weight_B)
                if key not in drawn:
                    drawn[key] = generator.multinomial(B, np.full(B, 1 / B), self.draws)
                weight_DB = drawn[key] * weight_B
                loss_D = weight_DB @ rung[kind].loss_SB.mean(0) / weight_DB.sum(1)
                change[:, k, r] = np.log(loss_D / self.loss_KR[k, r])
        return change

    # ---- what follows

    def exponent(self, kind: str) -> Span:
        k = self.kinds.index(kind)
        return Span.of(self.curves.exponent_KD[k, 0], self._drawn().exponent_KD[k])

    def floor(self) -> Span:
        return Span.of(self.curves.floor_D[0], self._drawn().floor_D)

    def loss(self, kind: str, flops: float) -> float:
        return float(self.curves.loss_D(kind, flops)[0])

    def predicted(self, kind: str, flops: float) -> Span:
        """Return the mean loss that as many seeds would have on the same examples with another budget."""
        generator = np.random.default_rng(self.seed + 1)
        noise = self._scatter(generator) * generator.standard_normal(self.draws)
        return Span.of(self.loss(kind, flops), self._drawn(False).loss_D(kind, flops) * np.exp(noise))

    def cheaper(self, kind: str, other: str, flops: float) -> Span:
        """Return how many times fewer FLOPs ``kind`` needs for the loss that ``other`` has at ``flops``."""
        both = [np.exp(c.log_cheaper_D(kind, other, flops)) for c in (self.curves, self._drawn())]
        return Span.of(both[0][0], both[1])

    def growth(self, kind: str, other: str, low: float, high: float) -> Span:
        """Return ``cheaper`` at ``high`` FLOPs over that at ``low``."""
        both = [
            np.exp(c.log_cheaper_D(kind, other, high) - c.log_cheaper_D(kind, other, low))
            for c in (self.curves, self._drawn())
        ]
        return Span.of(both[0][0], both[1])

    def crossing(self, kind: str, other: str) -> Span:
        """Return the FLOPs at which both kinds have one loss; the interval is wide where curves may be parallel."""
        both = [np.exp(c.log_crossing_D(kind, other)) for c in (self.curves, self._drawn())]
        return Span.of(both[0][0], both[1])
