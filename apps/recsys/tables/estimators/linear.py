"""Logistic regression on a sparse matrix of all columns."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from apps.equal_cost.comparison import Search
from apps.recsys.kinds import Count, Kind, Regression, Revenue
from apps.recsys.tables.estimators.base import PerTask, TaskData, best_of, outputs_of, quality_of, sparse_values
from apps.recsys.tables.rows.arrays import TableArrays
from apps.recsys.value_metrics import TWEEDIE_POWER


class LogisticRegression(PerTask):
    """scikit-learn's ``LogisticRegression`` on a sparse matrix, one a task; ``Ridge`` and ``PoissonRegressor`` of
    numbers and counts.

    Categorical columns are one-hot, multi-valued ones averaged over their values; continuous columns are one-hot by the
    quantile bins of the training split, with a bin for missing values, and also standardized next to that. The strength
    of the L2 penalty is tuned on the validation split's AUC, and so is whether there are bins: hundreds of them overfit
    a small table. Nothing is random: all seeds give the same model.

    Args:
        strengths: values of scikit-learn's C, the inverse penalty, to try.
        max_iter: largest number of iterations of L-BFGS.
        n_threads, steps: see ``PerTask``.
    """

    kind = "linear"

    def __init__(
        self,
        strengths: tuple[float, ...] = (0.01, 0.1, 1.0),
        max_iter: int = 200,
        n_threads: int | None = None,
        steps: bool = False,
    ) -> None:
        super().__init__(n_threads, steps)
        if not strengths or any(not c > 0 for c in strengths):
            raise ValueError(f"strengths={strengths} must be positive numbers")
        self.strengths, self.max_iter = strengths, max_iter

    def num_settings(self, task: TaskData) -> int:
        return len(self.strengths) * (1 + bool(task.train.features.continuous))

    def tune_task(self, task: TaskData, search: Search, part: tuple[float, float]) -> dict[str, Any]:
        forms = (True, False) if task.train.features.continuous else (True,)
        candidates = [{"C": strength, "bins": bins} for strength in sorted(self.strengths) for bins in forms]

        def quality(options: dict[str, Any]) -> float:
            return self.fit_task(task, options)[1]["val_quality"]

        return best_of(candidates, quality, search, task.name, part[1], one_at_least=True)[0]

    def fit_task(self, task: TaskData, settings: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        from sklearn.exceptions import ConvergenceWarning

        bins = settings.get("bins", True)
        x, xv = design_matrix(task.train, bins)[task.kept_N], design_matrix(task.val, bins)[task.kept_V]
        model, y_N = self._model(task.kind, settings["C"], task.y_N)
        with warnings.catch_warnings():
            # The best strength is chosen by validation; an optimizer cut short is one more regularizer.
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit(x, y_N, task.weight_N)
        # Rows of classes, one of numbers and of two classes.
        fitted = _Linear(task.kind, np.atleast_2d(model.coef_), np.atleast_1d(model.intercept_), _classes(model), bins)
        quality = quality_of(task.kind, fitted.decision(xv), task.yv_N)
        return fitted, {"C": settings["C"], "bins": bins, "val_quality": quality}

    def _model(self, kind: Kind, strength: float, y_N: np.ndarray) -> tuple[Any, np.ndarray]:
        """Return an untrained model of a kind of task, and the labels as it takes them."""
        from sklearn.linear_model import LogisticRegression as Logistic, PoissonRegressor, Ridge, TweedieRegressor

        if isinstance(kind, Count | Revenue):
            # Its loss is a mean over the rows, where logistic regression's is a sum.
            options = {"alpha": 1 / (strength * len(y_N)), "max_iter": self.max_iter}
            is_poisson = kind.target.kind in ("count", "poisson", "regression")
            model = (
                PoissonRegressor(**options)
                if is_poisson
                else TweedieRegressor(power=TWEEDIE_POWER, link="log", **options)
            )
            return model, y_N / kind.target.mean
        if isinstance(kind, Regression):
            return Ridge(alpha=1 / strength), (y_N - kind.target.mean) / kind.target.std
        return Logistic(C=strength, max_iter=self.max_iter), y_N.astype(np.int64)

    def decision(self, model: Any, arrays: TableArrays) -> np.ndarray:
        return np.asarray(model.decision(design_matrix(arrays, model.bins)), dtype=np.float64)


@dataclass(frozen=True)
class _Linear:
    """Trained weights: one row of numbers or of two classes, else one a class of ``classes``.

    ``bins`` is an argument of ``design_matrix``.
    """

    kind: Kind
    weights_CD: np.ndarray
    bias_C: np.ndarray
    classes: np.ndarray | None
    bins: bool = True

    def decision(self, x: Any) -> np.ndarray:
        """Return the outputs of the rows of a design matrix, (N,) or (N, width)."""
        raw_NC = np.asarray(x @ self.weights_CD.T + self.bias_C, dtype=np.float64)
        raw = raw_NC[:, 0] if raw_NC.shape[1] == 1 else raw_NC
        if self.classes is not None:
            return outputs_of(self.kind, raw, self.classes)
        if self.kind.width == 1:
            return raw
        mean, std = self.kind.target.mean, self.kind.target.std
        return outputs_of(self.kind, mean * np.exp(raw) if isinstance(self.kind, Revenue) else mean + std * raw)


def _classes(model: Any) -> np.ndarray | None:
    return np.asarray(model.classes_) if hasattr(model, "classes_") else None


def design_matrix(arrays: TableArrays, bins: bool = True) -> Any:
    """Return the columns of ``LogisticRegression`` as a scipy CSR matrix of float32 (N, D).

    Args:
        arrays: the rows.
        bins: whether numbers are also one-hot by their bins.
    """
    from scipy import sparse

    N, features = len(arrays), arrays.features
    places = list(arrays.ids_NF.T)
    sizes = [f.num_rows for f in features.single]
    if arrays.domain_N is not None:
        places.append(arrays.domain_N)
        sizes.append(features.num_domains)
    for column, values_N in zip(features.continuous, arrays.dense_NC.T, strict=True):
        quantiles = np.asarray(column.quantiles if bins else ())
        last = len(quantiles) + 1  # of missing numbers
        places.append(np.where(np.isnan(values_N), last, np.searchsorted(quantiles, values_N)))
        sizes.append(last + 1)
    parts = []
    if places:
        # Not OneHotEncoder: it sorts and checks each column, although the places are known to be in range.
        offsets = np.cumsum([0, *sizes[:-1]])
        index_NK = np.stack(places, 1).astype(np.int64) + offsets
        K = index_NK.shape[1]
        ones = np.ones(N * K, dtype=np.float32)
        parts.append(sparse.csr_matrix((ones, index_NK.ravel(), np.arange(N + 1) * K), shape=(N, sum(sizes))))
    if features.continuous:
        mean_C = np.array([c.mean for c in features.continuous])
        std_C = np.array([c.std for c in features.continuous])
        scaled_NC = np.clip((arrays.dense_NC - mean_C) / std_C, -5, 5)  # a far value must not make the solver crawl
        parts.append(sparse.csr_matrix(np.nan_to_num(scaled_NC).astype(np.float32)))
    if arrays.vector_NV is not None:
        scale_V = np.repeat([f.scale for f in features.vectors], [f.size for f in features.vectors])
        parts.append(sparse.csr_matrix(np.nan_to_num(arrays.vector_NV / scale_V).astype(np.float32)))
    for feature in features.several:
        several = arrays.multi[feature.name]
        shares = np.repeat(1.0 / np.maximum(several.lengths_N, 1), several.lengths_N).astype(np.float32)
        parts.append(sparse_values(several, feature.num_rows, shares))
    return sparse.hstack(parts, format="csr")
