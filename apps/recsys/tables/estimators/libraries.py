"""Boosted trees of LightGBM and of CatBoost, where these libraries are installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from apps.data.given import NUMBERS
from apps.equal_cost.comparison import Search
from apps.recsys.encoding.features import Features
from apps.recsys.kinds import Count, Kind, Regression, Revenue
from apps.recsys.tables.estimators.base import EncodedTask, PerTask, TaskData, best_of, outputs_of, quality_of
from apps.recsys.tables.estimators.boosting import FrequentValues
from apps.recsys.tables.rows.arrays import TableArrays

PATIENCE = 50
"""Trees without a better validation loss before training ends."""


class _Library(PerTask):
    """One model a task, with each categorical column split by category as the library does it.

    Continuous columns enter as they are, NaN too; multi-valued ones become the number of values and a column for each
    of the 64 most frequent ones. Settings are tried in order on all training rows, each with as many trees as the
    validation split's loss allows; the best is the one of the best AUC (R^2 of numbers and levels) there.

    Args:
        max_iter: largest number of trees.
        n_threads, steps: see ``PerTask``.
    """

    package: ClassVar[str]
    """Name of the library."""

    settings: ClassVar[tuple[dict[str, Any], ...]]
    """What is tried; the first in any case."""

    losses: ClassVar[dict[str, tuple[str, str]]]
    """The loss, and the metric that ends a training, by kind of task, or by the loss of a regression."""

    def __init__(self, max_iter: int = 2000, n_threads: int | None = None, steps: bool = False) -> None:
        super().__init__(n_threads, steps)
        self.max_iter = max_iter

    @classmethod
    def is_installed(cls) -> bool:
        return importlib.util.find_spec(cls.package) is not None

    def num_settings(self, task: TaskData) -> int:
        return len(self.candidates(task))

    def candidates(self, task: TaskData) -> Sequence[dict[str, Any]]:
        """Return what is tried for a task."""
        return self.settings

    def tune_task(self, task: TaskData, search: Search, part: tuple[float, float]) -> dict[str, Any]:
        rows = rows_of(task)

        def quality(options: dict[str, Any]) -> float:
            return quality_of(task.kind, self._train(rows, options).decision(rows.xv), task.yv_N)

        return best_of(self.candidates(task), quality, search, task.name, part[1], one_at_least=True)[0]

    def fit_task(self, task: TaskData, settings: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        rows = rows_of(task)
        fitted = self._train(rows, settings)
        quality = quality_of(task.kind, fitted.decision(rows.xv), task.yv_N)
        return (rows.columns, fitted), {**settings, "iterations": fitted.iterations, "val_quality": quality}

    def decision(self, model: Any, arrays: TableArrays) -> np.ndarray:
        columns, fitted = model
        return np.asarray(fitted.decision(columns.of(arrays)), dtype=np.float64)

    def _train(self, rows: EncodedTask, settings: Mapping[str, Any]) -> Any:
        """Return trained trees with ``decision`` and ``iterations``."""
        raise NotImplementedError

    def _loss(self, kind: Kind) -> tuple[str, str]:
        """Return the entry of ``losses`` for a kind of task."""
        target = kind.target
        name = target.loss if target.kind == "regression" and target.loss in self.losses else target.kind
        name = "poisson" if isinstance(kind, Count) and name not in self.losses else name
        return self.losses.get(name, self.losses["classes"])

    @property
    def _num_threads(self) -> int:
        return self.n_threads or torch.get_num_threads()


class LightGBM(_Library):
    """LightGBM's boosted trees; see ``_Library``."""

    package = "lightgbm"
    settings = tuple(
        {"num_leaves": leaves, "feature_fraction": share, "lambda_l2": penalty, "min_data_per_group": group}
        for leaves, share, penalty, group in (
            (31, 1.0, 0.0, 100),
            (31, 0.6, 10.0, 100),
            (15, 0.6, 10.0, 100),
            (63, 0.6, 10.0, 100),
            (127, 0.4, 20.0, 100),
            (31, 0.6, 10.0, 20),
        )
    )

    losses: ClassVar[dict[str, tuple[str, str]]] = {
        "binary": ("binary", "auc"),
        "classes": ("multiclass", "multi_logloss"),
        "squared": ("regression", "l2"),
        "absolute": ("regression_l1", "l1"),
        "poisson": ("poisson", "poisson"),
        "tweedie": ("tweedie", "tweedie"),
        "revenue": ("tweedie", "tweedie"),
        "quantile": ("regression_l1", "l1"),
    }

    def candidates(self, task: TaskData) -> Sequence[dict[str, Any]]:
        if task.kind.target.kind not in ("tweedie", "revenue"):
            return self.settings
        # Where the inputs nearly give an amount, the squared loss is the better one.
        losses: tuple[dict[str, str], ...] = ({}, {"objective": "regression", "metric": "l2"})
        return [{**options, **loss} for options in self.settings for loss in losses]

    def trees_per_round(self, kind: Kind) -> int:
        """Return how many trees each round of boosting adds: one for each class, else one."""
        return len(kind.target.shares) if self._loss(kind)[0] == "multiclass" else 1

    def _train(self, rows: EncodedTask, settings: Mapping[str, Any]) -> Boosted:
        import lightgbm

        task, (objective, metric) = rows.task, self._loss(rows.task.kind)
        options = {
            "objective": objective, "metric": metric, "learning_rate": 0.05, **settings, "verbosity": -1,
            "seed": task.seed, "deterministic": True, "force_row_wise": True, "num_threads": self._num_threads,
            "bagging_fraction": 0.8, "bagging_freq": 1, "num_class": self.trees_per_round(task.kind),
        }  # fmt: skip
        categories = list(range(rows.columns.num_continuous, rows.columns.end_of_categories))
        train = lightgbm.Dataset(rows.x, task.y_N, weight=task.weight_N, categorical_feature=categories)
        val = lightgbm.Dataset(rows.xv, task.yv_N, reference=train)
        stop = lightgbm.early_stopping(PATIENCE, verbose=False)
        model = lightgbm.train(options, train, self.max_iter, valid_sets=[val], callbacks=[stop])
        return Boosted(task.kind, model, model.best_iteration or model.current_iteration())


@dataclass(frozen=True)
class Boosted:
    """LightGBM's trees of one task, and how many rounds of them are used."""

    kind: Kind
    model: Any
    iterations: int

    def decision(self, x: np.ndarray) -> np.ndarray:
        options = {"num_iteration": self.iterations, "num_threads": torch.get_num_threads()}
        if self.kind.target.kind in NUMBERS:
            return outputs_of(self.kind, np.asarray(self.model.predict(x, **options)))
        raw = np.asarray(self.model.predict(x, raw_score=True, **options))
        return outputs_of(self.kind, raw, np.arange(len(self.kind.target.shares)))


class CatBoost(_Library):
    """CatBoost's boosted trees; see ``_Library``."""

    package = "catboost"
    settings = tuple(
        {"depth": depth, "l2_leaf_reg": penalty, "learning_rate": rate}
        for depth, penalty, rate in ((6, 3.0, 0.1), (8, 3.0, 0.1), (6, 10.0, 0.05), (4, 3.0, 0.1))
    )

    losses: ClassVar[dict[str, tuple[str, str]]] = {
        "binary": ("Logloss", "AUC"),
        "classes": ("MultiClass", "MultiClass"),
        "squared": ("RMSE", "RMSE"),
        "absolute": ("MAE", "MAE"),
        "poisson": ("Poisson", "Poisson"),
        "tweedie": ("Tweedie:variance_power=1.5", "Tweedie:variance_power=1.5"),
        "revenue": ("Tweedie:variance_power=1.5", "Tweedie:variance_power=1.5"),
        "quantile": ("MAE", "MAE"),
    }

    def _train(self, rows: EncodedTask, settings: Mapping[str, Any]) -> _CatBoost:
        import catboost

        task, (loss, metric) = rows.task, self._loss(rows.task.kind)
        options = {
            **settings, "loss_function": loss, "eval_metric": metric, "iterations": self.max_iter,
            "random_seed": task.seed, "thread_count": self._num_threads, "od_type": "Iter", "od_wait": PATIENCE,
            "use_best_model": True, "allow_writing_files": False, "verbose": False,
        }  # fmt: skip
        model = catboost.CatBoost(options)
        train = rows.columns.pool(rows.x, task.y_N, task.weight_N)
        model.fit(train, eval_set=rows.columns.pool(rows.xv, task.yv_N, None))
        return _CatBoost(task.kind, rows.columns, model, model.tree_count_)


@dataclass(frozen=True)
class _CatBoost:
    """Trained trees, and how many they are."""

    kind: Kind
    columns: LibraryColumns
    model: Any
    iterations: int

    def decision(self, x: np.ndarray) -> np.ndarray:
        pool = self.columns.pool(x, None, None)
        raw = np.asarray(self.model.predict(pool, prediction_type="RawFormulaVal"))
        if isinstance(self.kind, Count | Revenue):  # Poisson's and Tweedie's are logarithms
            return outputs_of(self.kind, np.exp(raw))
        if isinstance(self.kind, Regression):
            return outputs_of(self.kind, raw)
        classes = np.asarray(self.model.classes_, dtype=np.float64).astype(np.int64)
        return outputs_of(self.kind, raw, classes)


@dataclass(frozen=True)
class LibraryColumns:
    """The inputs of the libraries from a table: numbers, then categories, then multi-valued columns as numbers.

    Attributes:
        several: the multi-valued columns' most frequent values.
        num_continuous, end_of_categories: where the columns of categories start and end.
    """

    several: FrequentValues
    num_continuous: int
    end_of_categories: int

    @classmethod
    def of_features(cls, features: Features, several: FrequentValues) -> LibraryColumns:
        """Return the columns of a table."""
        first = len(features.continuous)
        return cls(several, first, first + len(features.single) + bool(features.num_domains))

    def width(self, features: Features) -> int:
        """Return the number D of all columns."""
        several = sum(1 + len(values) for values in self.several.by_column.values())
        return self.end_of_categories + several + sum(f.size for f in features.vectors)

    def of(self, arrays: TableArrays) -> np.ndarray:
        """Return the columns of all rows, float64 (N, D); places in a table are integers."""
        parts = [arrays.dense_NC, arrays.ids_NF]
        if arrays.domain_N is not None:
            parts.append(arrays.domain_N[:, None])
        parts += self.several.of(arrays)
        if arrays.vector_NV is not None:
            parts.append(arrays.vector_NV)
        return np.concatenate([p.astype(np.float64) for p in parts], axis=1)

    def pool(self, x: np.ndarray, y_N: np.ndarray | None, weight_N: np.ndarray | None) -> Any:
        """Return rows as CatBoost takes them, whose categories are integers next to float32 numbers."""
        import catboost

        first, last = self.num_continuous, self.end_of_categories
        numbers = np.ascontiguousarray(np.delete(x, np.s_[first:last], axis=1), dtype=np.float32)
        categories = np.ascontiguousarray(x[:, first:last].astype(np.int64).astype(str).astype(object))
        features = catboost.FeaturesData(num_feature_data=numbers, cat_feature_data=_as_bytes(categories))
        return catboost.Pool(features, y_N, weight=weight_N)


def rows_of(task: TaskData) -> EncodedTask:
    """Return the labeled rows of a task."""
    columns = LibraryColumns.of_features(task.train.features, FrequentValues.counted(task.train))
    return EncodedTask(task, columns, columns.of(task.train)[task.kept_N], columns.of(task.val)[task.kept_V])


def _as_bytes(values: np.ndarray) -> np.ndarray:
    """Return texts as the bytes that CatBoost's ``FeaturesData`` takes."""
    made = np.empty(values.shape, dtype=object)
    made.ravel()[:] = [value.encode() for value in values.ravel()]
    return made
