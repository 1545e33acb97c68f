"""Boosted trees, and the columns that they are given."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import numpy as np

from apps.base.checks import check_at_least
from apps.data.given import NUMBERS
from apps.equal_cost.comparison import Search
from apps.recsys.encoding.features import CategoricalFeature
from apps.recsys.kinds import Count, Kind, Quantile, Revenue
from apps.recsys.tables.estimators.base import (
    EncodedTask,
    PerTask,
    TaskData,
    best_of,
    outputs_of,
    quality_of,
    sparse_values,
)
from apps.recsys.tables.rows.arrays import TableArrays

MAX_CATEGORIES = 255
"""Largest number of categories by which scikit-learn's boosting splits a column."""

FOLDS = 5
"""Folds of the cross-fitted mean label of a value."""

SMOOTHING = 10.0
"""Examples of the overall mean that are added to those of a value."""

MULTI_HOT = 64
"""Number of a multi-valued column's most frequent values that get a column each."""

TREES = tuple({"max_leaf_nodes": a, "max_features": b} for a, b in itertools.product((31, 15, 63), (1.0, 0.5)))
PENALTIES = tuple({"l2_regularization": a} for a in (1.0, 20.0))
"""Settings tried on some rows, the second ones with the best of the first, which have no penalty."""

WHOLE = tuple({"learning_rate": a, "by_category": b} for a, b in ((0.05, True), (0.05, False), (0.1, True)))
"""Settings tried on all rows."""

SOME_ROWS = 0.6
"""Share of a task's time for the settings on some rows."""


class HistGradientBoosting(PerTask):
    """scikit-learn's ``HistGradientBoostingClassifier``, or its regressor, one a task.

    Continuous columns enter as they are, NaN too. Categorical columns of at most 255 rows are split by category; larger
    ones become the cross-fitted mean label of their value and its frequency. Multi-valued columns become the number of
    values and a column for each of the 64 most frequent ones.

    Tuned, on the validation split's AUC (R^2 of numbers and levels): leaves and the share of columns a split looks at,
    then the L2 penalty, on at most ``search_rows`` training rows; then the learning rate, and whether categories are
    split as such or as numbers, on all of them, each with as many of ``max_iter`` trees as are best. A search whose
    time is up keeps the best so far; the last two fifths of the time are for the settings on all rows. The seed draws
    the search rows, the folds and the columns of a split.

    Args:
        tuned: whether to search; False: scikit-learn's defaults and ``UNTUNED_ITERATIONS`` trees.
        max_iter: largest number of trees, tuned.
        search_rows: training rows of the first two searches.
        n_threads, steps: see ``PerTask``.
    """

    UNTUNED_ITERATIONS: ClassVar[int] = 150
    SEARCH_ITERATIONS: ClassVar[int] = 200
    """Trees at most in the first two searches."""
    STEP: ClassVar[int] = 50
    """Trees between two looks at the validation split."""
    PATIENCE: ClassVar[int] = 4
    """Looks without a better one before training ends."""

    def __init__(
        self,
        tuned: bool = True,
        max_iter: int = 600,
        search_rows: int = 50_000,
        n_threads: int | None = None,
        steps: bool = False,
    ) -> None:
        super().__init__(n_threads, steps)
        check_at_least(1, max_iter=max_iter)
        self.tunes, self.max_iter, self.search_rows = tuned, max_iter, search_rows

    def num_settings(self, task: TaskData) -> int:
        if not self.tunes:
            return 0
        return len(TREES) + len(PENALTIES) + len(_whole_settings(Columns(task.train).num_categories > 0))

    def tune_task(self, task: TaskData, search: Search, part: tuple[float, float]) -> dict[str, Any]:
        if not self.tunes:
            return {}
        rows = self._rows(task)
        few = np.sort(np.random.default_rng(task.seed).permutation(len(task.y_N))[: self.search_rows])
        if len(np.unique(task.y_N[few])) < 2:
            few = np.arange(len(task.y_N))
        limit = min(self.SEARCH_ITERATIONS, self.max_iter)

        def some_rows(options: dict[str, Any]) -> float:
            own = {**options, "learning_rate": 0.1}
            return self._boost(rows, _mask(rows), few, own, limit)[1]

        begins, ends = part
        until = begins + SOME_ROWS * (ends - begins)
        best, at = best_of(TREES, some_rows, search, f"{task.name}, some rows", until)
        penalized, quality = best_of(
            [{**best, **penalty} for penalty in PENALTIES], some_rows, search, f"{task.name}, some rows", until
        )
        best = penalized if quality > at else best
        candidates = [{**best, **further} for further in _whole_settings(bool(_mask(rows).any()))]
        title = f"{task.name}, all rows"
        return best_of(candidates, lambda o: self._whole(rows, o).quality, search, title, ends, one_at_least=True)[0]

    def fit_task(self, task: TaskData, settings: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        rows = self._rows(task)
        if not self.tunes:
            model = _booster(task, _mask(rows), {}, self.UNTUNED_ITERATIONS)
            model.fit(rows.x, _labels(task), task.weight_N)
            return (rows.columns, _Boosted(task.kind, model, 0)), {"iterations": self.UNTUNED_ITERATIONS}
        fitted = self._whole(rows, settings)
        return (rows.columns, fitted), {**settings, "iterations": fitted.iterations, "val_quality": fitted.quality}

    def decision(self, model: Any, arrays: TableArrays) -> np.ndarray:
        columns, fitted = model
        return fitted.decision(columns.transform(arrays))

    def _rows(self, task: TaskData) -> EncodedTask:
        columns = Columns(task.train, task.kind)
        x_ND = columns.fit_transform(task.train, task.kept_N, _labels(task), task.seed)
        return EncodedTask(task, columns, x_ND, columns.transform(task.val)[task.kept_V] if self.tunes else x_ND[:0])

    def _whole(self, rows: EncodedTask, settings: Mapping[str, Any]) -> _Boosted:
        """Return trees on all rows, as many of them as are best on the validation split."""
        options = {name: value for name, value in settings.items() if name != "by_category"}
        mask_D = _mask(rows) & settings["by_category"]
        model, _ = self._boost(rows, mask_D, slice(None), options, self.max_iter)
        kind, yv_N = rows.task.kind, rows.task.yv_N
        by_number = [quality_of(kind, z_N, yv_N) for z_N in _staged(kind, model, rows.xv)]
        return _Boosted(kind, model, int(np.argmax(by_number)) + 1, max(by_number))

    def _boost(
        self, rows: EncodedTask, mask_D: np.ndarray, some: Any, options: Mapping[str, Any], max_iter: int
    ) -> tuple[Any, float]:
        """Add trees until the validation split has seen no better number of them for a while; return its best too."""
        task, model = rows.task, _booster(rows.task, mask_D, options, 0)
        y_N, weight_N = _labels(task)[some], None if task.weight_N is None else task.weight_N[some]
        best, waited = -math.inf, 0
        for trees in (*range(self.STEP, max_iter, self.STEP), max_iter):
            model.set_params(max_iter=trees).fit(rows.x[some], y_N, weight_N)
            quality = quality_of(task.kind, _decision(task.kind, model, rows.xv), task.yv_N)
            best, waited = (quality, 0) if quality > best else (best, waited + 1)
            if waited == self.PATIENCE:
                break
        return model, best


class HistGradientBoostingUntuned(HistGradientBoosting):
    """``HistGradientBoosting`` with scikit-learn's defaults and 150 trees."""

    def __init__(self, n_threads: int | None = None, steps: bool = False) -> None:
        super().__init__(tuned=False, n_threads=n_threads, steps=steps)


def _whole_settings(has_categories: bool) -> list[dict[str, Any]]:
    return [options for options in WHOLE if options["by_category"] or has_categories]


def _is_number(kind: Kind) -> bool:
    """Return whether labels are numbers that trees predict themselves, and no classes or levels."""
    return kind.target.kind in NUMBERS


def _labels(task: TaskData) -> np.ndarray:
    """Return the training labels as scikit-learn takes them."""
    return task.y_N if _is_number(task.kind) else task.y_N.astype(np.int64)


def _mask(rows: EncodedTask) -> np.ndarray:
    """Return which columns are split by category, bool (D,)."""
    return rows.columns.mask(rows.x.shape[1])


def _booster(task: TaskData, mask_D: np.ndarray, options: Mapping[str, Any], trees: int) -> Any:
    from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor

    booster: Any = HistGradientBoostingClassifier
    if _is_number(task.kind):
        is_amount = isinstance(task.kind, Count | Revenue)  # it has no Tweedie loss
        is_median = isinstance(task.kind, Quantile) or task.kind.target.loss == "absolute"
        loss = "poisson" if is_amount else "absolute_error" if is_median else "squared_error"
        booster = partial(HistGradientBoostingRegressor, loss=loss)
    return booster(
        max_iter=max(trees, 1),
        warm_start=not trees,  # more trees are added to those there are
        early_stopping=False,  # its own split would be taken from the training rows
        categorical_features=mask_D if mask_D.any() else None,
        random_state=task.seed,
        **options,
    )


def _staged(kind: Kind, model: Any, x_ND: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the outputs after each tree."""
    if _is_number(kind):
        return (outputs_of(kind, raw) for raw in model.staged_predict(x_ND))
    return (outputs_of(kind, raw, model.classes_) for raw in model.staged_decision_function(x_ND))


def _decision(kind: Kind, model: Any, x_ND: np.ndarray) -> np.ndarray:
    """Return the outputs after all trees."""
    if _is_number(kind):
        return outputs_of(kind, model.predict(x_ND))
    return outputs_of(kind, model.decision_function(x_ND), model.classes_)


@dataclass(frozen=True)
class _Boosted:
    """Trained trees, and how many of them are used; 0: all."""

    kind: Kind
    model: Any
    iterations: int
    quality: float = math.nan

    def decision(self, x_ND: np.ndarray) -> np.ndarray:
        if not self.iterations:
            return _decision(self.kind, self.model, x_ND)
        return next(itertools.islice(_staged(self.kind, self.model, x_ND), self.iterations - 1, None))


class Columns:
    """The columns of one task's boosting, float32 (N, D): see ``HistGradientBoosting``.

    Args:
        train: the rows of training, labeled or not.
        kind: kind of the target.
    """

    def __init__(self, train: TableArrays, kind: Kind | None = None) -> None:
        from sklearn.preprocessing import TargetEncoder

        features = train.features
        single = [f.num_rows for f in features.single]
        self.small = [i for i, size in enumerate(single) if size <= MAX_CATEGORIES]
        self.large = [i for i, size in enumerate(single) if size > MAX_CATEGORIES]
        self.sizes = [single[i] for i in self.large]
        self.num_continuous = len(features.continuous)
        has_domain = train.domain_N is not None and features.num_domains <= MAX_CATEGORIES
        self.num_categories = len(self.small) + has_domain
        self.several = FrequentValues.counted(train)
        label = "binary" if kind is None else kind.target.kind
        self.is_stratified = label in ("binary", "multiclass")
        target_type = label if self.is_stratified else "continuous"
        self.encoder = TargetEncoder(target_type=target_type, smooth=SMOOTHING)
        self.counts: list[np.ndarray] = []

    def fit_transform(self, train: TableArrays, kept_N: np.ndarray, y_N: np.ndarray, seed: int) -> np.ndarray:
        """Return the columns of the labeled rows; a value's mean label is cross-fitted, or rare ones would leak it."""
        from sklearn.model_selection import KFold, StratifiedKFold

        ids_NF = train.ids_NF[kept_N][:, self.large]
        self.counts = [np.bincount(ids_N, minlength=size) for ids_N, size in zip(ids_NF.T, self.sizes, strict=True)]
        folds = StratifiedKFold if self.is_stratified else KFold
        self.encoder.set_params(cv=folds(FOLDS, shuffle=True, random_state=seed))
        return self._columns(train, kept_N, self.encoder.fit_transform(ids_NF, y_N) if self.large else None)

    def transform(self, arrays: TableArrays) -> np.ndarray:
        """Return the columns of all rows."""
        rates_NF = self.encoder.transform(arrays.ids_NF[:, self.large]) if self.large else None
        return self._columns(arrays, np.ones(len(arrays), dtype=bool), rates_NF)

    def mask(self, num_columns: int) -> np.ndarray:
        """Return which of the columns hold categories, bool (D,)."""
        place_D = np.arange(num_columns)
        return (place_D >= self.num_continuous) & (place_D < self.num_continuous + self.num_categories)

    def _columns(self, arrays: TableArrays, kept_N: np.ndarray, rates_NF: np.ndarray | None) -> np.ndarray:
        parts = [arrays.dense_NC[kept_N], arrays.ids_NF[kept_N][:, self.small]]
        if arrays.domain_N is not None:
            parts.append(arrays.domain_N[kept_N, None])
        if rates_NF is not None:
            ids_NF = arrays.ids_NF[kept_N][:, self.large]
            parts += [rates_NF, np.stack([np.log1p(c[i]) for c, i in zip(self.counts, ids_NF.T, strict=True)], 1)]
        parts += [part[kept_N] for part in self.several.of(arrays)]
        if arrays.vector_NV is not None:
            parts.append(arrays.vector_NV[kept_N])
        return np.concatenate([p.astype(np.float32) for p in parts], axis=1)


@dataclass(frozen=True)
class FrequentValues:
    """Multi-valued columns as columns of one number: the number of values, and 1 or 0 for each of the most frequent.

    Attributes:
        num_rows: number of different values, by multi-valued column.
        by_column: the values that have a column, ascending, likewise.
    """

    num_rows: Mapping[str, int]
    by_column: Mapping[str, np.ndarray]

    @classmethod
    def counted(cls, train: TableArrays) -> FrequentValues:
        """Return the most frequent values of the rows of training."""
        several = train.features.several
        return cls({f.name: f.num_rows for f in several}, {f.name: _most_frequent(train, f) for f in several})

    def of(self, arrays: TableArrays) -> list[np.ndarray]:
        """Return the columns of all rows, (N, 1) and (N, at most 64) for each multi-valued column."""
        parts = []
        for name, values in self.by_column.items():
            column = arrays.multi[name]
            has = sparse_values(column, self.num_rows[name])[:, values] > 0
            parts += [column.lengths_N[:, None], has.toarray()]
        return parts


def _most_frequent(train: TableArrays, feature: CategoricalFeature) -> np.ndarray:
    counts = np.bincount(train.multi[feature.name].values, minlength=feature.num_rows)
    return np.sort(np.argsort(-counts, kind="stable")[:MULTI_HOT])
