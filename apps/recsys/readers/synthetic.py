"""Tasks of a chosen correlation, made by the recipe of the MMoE paper.

Ma et al., "Modeling Task Relationships in Multi-task Learning with Multi-gate Mixture-of-Experts", KDD 2018
(doi 10.1145/3219819.3220007), section 3.3: with orthonormal u_1 ... u_t and inputs x of independent standard normals,

    w_k = c (L u)_k,    L L^T = the matrix with 1 on the diagonal and p elsewhere
    y_k = w_k . x + sum_i sin(alpha_i (w_k . x) + beta_i) + noise,    noise ~ N(0, noise_std^2)

For two tasks w_1 = c u_1 and w_2 = c (p u_1 + sqrt(1 - p^2) u_2), as in the paper. Its y is a regression target; here a
label is y above a threshold, the same for all tasks, so that a chosen share is positive.

Besides the numbers there may be a column of ids, for embeddings of millions of rows: id i of N is sampled with
frequency about proportional to 1 / i, and adds a normal number of its own to each y.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import numpy as np
from numpy.typing import NDArray

from apps.recsys.schema import Seed, SplitConfig, TableConfig, TaskConfig
from core.fields import Bounds, Checked, Count, CountOrZero, NotNegative, Positive

if TYPE_CHECKING:
    from apps.recsys.readers.raw import RawTables

Array = NDArray[np.float64]


@dataclass(frozen=True)
class SyntheticConfig(Checked):
    """The sizes and distributions of a synthetic table.

    Attributes:
        correlation: p, the cosine between the weights of two tasks, from -1/(num_tasks - 1) to 1. The labels' own
            correlation is ``label_correlation``.
        num_rows: rows of all splits.
        num_features: inputs of each row, at least num_tasks.
        num_tasks: labels of each row.
        scale: c, the standard deviation of w . x.
        alphas, betas: numbers in the sines, as many of one as of the other; the tasks are linear if there are none.
        noise_std: standard deviation of the noise in y.
        positives: share of positive labels, in (0, 1).
        num_ids: N, distinct values of the column ``id``; 0: there is no such column.
        id_std: standard deviation of an id's contribution to y.
        seed: seed of all draws.

    Raises:
        ValueError: a value outside its range.
    """

    correlation: float = 0.5
    num_rows: Annotated[int, Bounds(10)] = 20_000
    num_features: Count = 32
    num_tasks: Count = 2
    scale: Positive = 1.0
    alphas: tuple[float, ...] = (1.0, 2.0, 3.0, 4.0)
    betas: tuple[float, ...] = (0.0, 0.5, 1.0, 1.5)
    noise_std: NotNegative = 0.1
    positives: Annotated[float, Bounds(0, 1, "()")] = 0.5
    num_ids: CountOrZero = 0
    id_std: NotNegative = 1.0
    seed: Seed = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_features < self.num_tasks:
            raise ValueError(f"num_features={self.num_features} must be at least num_tasks={self.num_tasks}")
        lowest = -1 / (self.num_tasks - 1) if self.num_tasks > 1 else -1.0
        if not lowest <= self.correlation <= 1:
            raise ValueError(f"correlation={self.correlation} of {self.num_tasks} tasks must lie in [{lowest:.4g}, 1]")
        if len(self.alphas) != len(self.betas):
            raise ValueError(f"alphas has {len(self.alphas)} values, betas {len(self.betas)}: they go in pairs")

    @property
    def unexplained_std(self) -> float:
        """The standard deviation of the part of y that the numbers do not explain: noise plus the ids' contribution."""
        return math.hypot(self.noise_std, self.id_std if self.num_ids else 0.0)


@dataclass(frozen=True)
class Synthetic:
    """Synthetic data, with the weights that made them.

    Attributes:
        x: float64 (num_rows, num_features).
        y: float64 (num_rows, num_tasks), before the threshold.
        label: bool (num_rows, num_tasks).
        weights: float64 (num_tasks, num_features), rows of length ``scale``.
        label_correlation: correlation of the labels of two tasks in an endless table of endless ids.
        ids: int64 (num_rows,), from 0; None if there is no column of ids.
    """

    x: Array
    y: Array
    label: NDArray[np.bool_]
    weights: Array
    label_correlation: float
    ids: NDArray[np.int64] | None = None

    def tables(self) -> RawTables:
        """Return the columns x0, x1, ..., label_1, label_2, ... and maybe id, split at random."""
        import pyarrow as pa

        from apps.recsys.readers.raw import RawTables

        columns = {f"x{i}": pa.array(x_N) for i, x_N in enumerate(self.x.T)}
        labels = {f"label_{k}": pa.array(label_N) for k, label_N in enumerate(self.label.T, 1)}
        tasks = {name.replace("label", "task"): TaskConfig(name) for name in labels}
        ids = {} if self.ids is None else {"id": pa.array(self.ids)}
        config = TableConfig(
            categorical=tuple(ids),
            continuous=tuple(columns),
            tasks=tasks,
            split=SplitConfig("random", val=0.1, test=0.2),
        )
        return RawTables(train=pa.table({**ids, **columns, **labels}), val=None, test=None, config=config)


def generate(config: SyntheticConfig) -> Synthetic:
    """Draw a table. A configuration gives the same table on every machine."""
    random = np.random.RandomState(config.seed)  # numpy keeps its stream, which it does not for newer generators
    basis = np.linalg.qr(random.standard_normal((config.num_features, config.num_tasks)))[0].T
    weights = config.scale * _mixing(config.num_tasks, config.correlation) @ basis
    x = random.standard_normal((config.num_rows, config.num_features))
    noise = config.noise_std * random.standard_normal((config.num_rows, config.num_tasks))
    y = _curve(config, x @ weights.T) + noise
    ids = None
    if config.num_ids:
        # floor(N^u) - 1 with u uniform: the density of an id falls as 1 / (id + 1).
        ids = (float(config.num_ids) ** random.random_sample(config.num_rows)).astype(np.int64) - 1
        seen, which = np.unique(ids, return_inverse=True)
        y += config.id_std * random.standard_normal((len(seen), config.num_tasks))[which]
    threshold, correlation = label_correlation(config)
    return Synthetic(x, y, y > threshold, weights, correlation, ids)


def _mixing(num_tasks: int, p: float) -> Array:
    """Return L (t, t), lower triangular, with L L^T = (1 - p) I + p; also where that has an eigenvalue 0."""
    gram = (1 - p) * np.eye(num_tasks) + p
    values, vectors = np.linalg.eigh(gram)
    root = vectors * np.sqrt(np.maximum(values, 0))
    lower = np.linalg.qr(root.T)[1].T
    return lower * np.where(np.diag(lower) < 0, -1.0, 1.0)  # a column may have either sign: take the one above 0


def _curve(config: SyntheticConfig, s: Array) -> Array:
    """Return s + sum_i sin(alpha_i s + beta_i)."""
    return s + sum((np.sin(a * s + b) for a, b in zip(config.alphas, config.betas, strict=True)), np.zeros_like(s))


def label_correlation(config: SyntheticConfig, num: int = 1201) -> tuple[float, float]:
    """Return the threshold on y that makes the chosen share positive, and the correlation of two tasks' labels.

    w_1 . x / c and w_2 . x / c are standard normals z_1, z_2 of correlation p, and given z a label is positive with
    probability g(z) = P(f(c z) + noise > threshold). Pearson's correlation is (E[g(z_1) g(z_2)] - q^2) / (q (1 - q)),
    whose expectation is an integral over z_1 and z_2 | z_1, taken on a grid of ``num`` values each.
    """
    z = np.linspace(-8, 8, num)
    density = np.exp(-(z**2) / 2)
    density /= density.sum()
    share = config.positives
    curve = _curve(config, config.scale * z)
    reach = 1 + 9 * config.unexplained_std
    low, high = float(curve.min()) - reach, float(curve.max()) + reach
    for _ in range(60):
        threshold = (low + high) / 2
        if float(density @ _positive(config, z, threshold)) > share:
            low = threshold
        else:
            high = threshold
    p = config.correlation
    g = _positive(config, z, threshold)
    z_2 = p * z[:, None] + np.sqrt(1 - p * p) * z[None, :]
    both = float(density @ (g[:, None] * _positive(config, z_2, threshold)) @ density)
    return threshold, (both - share * share) / (share * (1 - share))


def _positive(config: SyntheticConfig, z: Array, threshold: float) -> Array:
    from scipy.special import ndtr

    margin = _curve(config, config.scale * z) - threshold
    std = config.unexplained_std
    return (margin > 0).astype(np.float64) if std == 0 else ndtr(margin / std)
