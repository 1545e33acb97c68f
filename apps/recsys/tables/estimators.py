"""scikit-learn's models as baselines of a multi-task recommender: one model a task, nothing shared.

They are estimators of ``apps.compare.systems``: ``tune`` finds the settings on the validation split, ``fit`` trains
with them, and the metrics have the names that the network logs. The test split is read by ``evaluate`` alone.

Threads: boosting and the sparse products run in as many as torch uses here (``n_threads=None``), so that several runs
at a time share the cores as networks do. Results depend on the seed, not on the number of threads, but for the order in
which boosting sums floats.
"""

from __future__ import annotations

import itertools
import logging
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import torch

from apps.equal_cost.twins import Search
from apps.recsys import binary_metrics
from apps.recsys.encoding.features import Features
from apps.recsys.metrics import MultiTaskMetrics
from apps.recsys.tables.arrays import TableArrays, gather
from apps.recsys.tables.tasks import step_labels

_logger = logging.getLogger(__name__)

MAX_CATEGORIES = 255
"""Of a column that scikit-learn's boosting splits by category."""

FOLDS = 5
"""Of the cross-fitted mean label of a value in boosting."""

SMOOTHING = 10.0
"""Examples of the overall mean that are added to those of a value."""

TREES = tuple({"max_leaf_nodes": a, "max_features": b} for a, b in itertools.product((31, 15, 63), (1.0, 0.5)))
PENALTIES = tuple({"l2_regularization": a} for a in (1.0, 20.0))
"""Settings that boosting tries on some rows, the second ones with the best of the first, which have no penalty."""

WHOLE = tuple({"learning_rate": a, "by_category": b} for a, b in ((0.05, True), (0.05, False), (0.1, True)))
"""Settings that boosting tries on all rows."""

SOME_ROWS = 0.6
"""Share of a task's time that is for the settings on some rows."""

MULTI_HOT = 64
"""The most frequent values of a multi-valued column that get a column each in boosting."""


class _PerTask:
    """One model a task: what both estimators share.

    Args:
        n_threads: of OpenMP and BLAS while training; None: as many as torch uses here.

    Attributes:
        steps: the tasks are steps, whose labels are filled in as `tasks.step_labels` does.
    """

    steps: bool = False
    tunes: bool = True
    """Whether there are settings to be searched, by ``tune``."""

    def __init__(self, n_threads: int | None = None) -> None:
        if n_threads is not None and n_threads < 1:
            raise ValueError(f"n_threads={n_threads} must be at least 1")
        self.n_threads = n_threads
        self.models: dict[str, Any] = {}
        self.chosen: dict[str, dict[str, Any]] = {}
        """What was tuned, by task."""

    def tune(self, data: Any, seed: int, search: Search | None = None) -> dict[str, dict[str, Any]]:
        """Find the settings of each task's model: trained on the training split, judged on the validation split.

        Args:
            data: set up already.
            seed: of what the search draws.
            search: how long it may take, and what it has tried before; None: as long as it takes. Each task has an
                equal part of the time, and what one leaves goes to the next. The first setting is tried in any case.

        Returns:
            By task, plain values for ``fit``; empty for a task whose training labels are of one class.

        Raises:
            ValueError: a split without rows.
        """
        search = search or Search()
        found: dict[str, dict[str, Any]] = {}
        with self._threads():
            tasks = self._tasks(data, seed)
            search.total = sum(self._num_settings(task) for _, task in tasks if isinstance(task, _Task))
            for t, (name, task) in enumerate(tasks):
                part = (t / len(tasks), (t + 1) / len(tasks))
                found[name] = self._tune_task(task, search, part) if isinstance(task, _Task) else {}
        return found

    def fit(self, data: Any, seed: int, settings: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        """Train on the training split of ``data``, which is set up; how long, the validation split says.

        Args:
            data: set up already.
            seed: of what the training draws.
            settings: what ``tune`` has found; None: tune now.

        Raises:
            ValueError: a split without rows.
        """
        settings = self.tune(data, seed) if settings is None else settings
        with self._threads():
            for name, task in self._tasks(data, seed):
                if isinstance(task, _Constant):
                    self.models[name], self.chosen[name] = task, {"constant": task.rate}
                else:
                    self.models[name], self.chosen[name] = self._fit_task(task, settings[name])
                _logger.info("%s, %s: %s", type(self).__name__, name, _words(self.chosen[name]))

    def _tasks(self, data: Any, seed: int) -> list[tuple[str, _Task | _Constant]]:
        """Return the labelled rows of each task, or the rate of one whose training labels are of one class."""
        train, val = gather(data, "train"), gather(data, "val")
        self._prepare(train)
        label_Nt, label_val_Nt = self._labels(train).numpy(), self._labels(val).numpy()
        found: list[tuple[str, _Task | _Constant]] = []
        for t, name in enumerate(train.features.tasks):
            y_N, yv_N = label_Nt[:, t], label_val_Nt[:, t]
            classes = np.unique(y_N[~np.isnan(y_N)])
            if len(classes) < 2:
                found.append((name, _Constant(float(classes[0]) if len(classes) else 0.5)))
            else:
                found.append((name, _Task(name, train, y_N, val, yv_N, seed)))
        return found

    def evaluate(self, data: Any, split: Literal["val", "test"]) -> Mapping[str, float]:
        """The metrics of ``MultiTaskMetrics``, as the module logs them, without the split."""
        with self._threads():
            arrays = gather(data, split)
            z_Nt = self.logits(arrays)
        metrics = MultiTaskMetrics(arrays.features.tasks, grouped=arrays.group_N is not None)
        groups = None if arrays.group_N is None else torch.from_numpy(arrays.group_N)
        metrics.update(torch.from_numpy(z_Nt), self._labels(arrays), groups)
        return {name: float(value) for name, value in metrics.compute().items()}

    def _labels(self, arrays: TableArrays) -> torch.Tensor:
        label_Nt = torch.from_numpy(arrays.label_Nt)
        return step_labels(label_Nt) if self.steps else label_Nt

    def logits(self, arrays: TableArrays) -> np.ndarray:
        """float64 (N, t)."""
        return np.stack([self._score(self.models[name], arrays) for name in arrays.features.tasks], axis=1)

    def _score(self, model: Any, arrays: TableArrays) -> np.ndarray:
        if isinstance(model, _Constant):
            return np.full(len(arrays), model.logit)
        return self._decision(model, arrays)

    def _threads(self) -> Any:
        from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

        return threadpool_limits(self.n_threads or torch.get_num_threads())

    def _prepare(self, train: TableArrays) -> None:
        """Learn from the training rows what all tasks need."""

    def _num_settings(self, task: _Task) -> int:
        """Return how many settings the whole search of a task has."""
        raise NotImplementedError

    def _tune_task(self, task: _Task, search: Search, part: tuple[float, float]) -> dict[str, Any]:
        """Return the best settings found; ``part``: from what share of the search's time to what share it may go on."""
        raise NotImplementedError

    def _fit_task(self, task: _Task, settings: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        raise NotImplementedError

    def _decision(self, model: Any, arrays: TableArrays) -> np.ndarray:
        raise NotImplementedError


@dataclass(frozen=True)
class _Task:
    """The rows of one task."""

    name: str
    train: TableArrays
    y_N: np.ndarray
    val: TableArrays
    yv_N: np.ndarray
    seed: int


@dataclass(frozen=True)
class _Constant:
    """Stands for the model of a task whose training labels are of one class."""

    rate: float

    @property
    def logit(self) -> float:
        p = min(max(self.rate, 1e-6), 1 - 1e-6)
        return math.log(p / (1 - p))


def _quality(z_N: np.ndarray, y_N: np.ndarray) -> float:
    """What is tuned for: AUC; where the validation rows have one class, the log likelihood."""
    found = binary_metrics.auc(z_N, y_N)
    if not math.isnan(found):
        return found
    loss = binary_metrics.log_loss(z_N, y_N)
    return 0.0 if math.isnan(loss) else -loss


def _words(chosen: Mapping[str, Any]) -> str:
    return ", ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in chosen.items())


# ---- boosted trees


class HistGradientBoosting(_PerTask):
    """scikit-learn's ``HistGradientBoostingClassifier``, one a task.

    Continuous columns enter as they are, NaN too. Categorical columns of at most 255 rows are split by category; larger
    ones become the cross-fitted mean label of their value and its frequency. Multi-valued columns become the number of
    values and a column for each of the 64 most frequent ones.

    Tuned, on the validation split's AUC: leaves and the share of columns a split looks at, then the L2 penalty, on at
    most ``search_rows`` training rows; then the learning rate, and whether categories are split as such or as numbers,
    on all of them, each with as many of ``max_iter`` trees as are best. A search whose time is up keeps the best so
    far; the last two fifths of the time are for the settings on all rows. The seed draws the search rows and the
    columns of a split.

    Args:
        tuned: search; False: scikit-learn's defaults and ``UNTUNED_ITERATIONS`` trees.
        max_iter: trees at most, tuned.
        search_rows: training rows of the first two searches.
        n_threads: see ``_PerTask``.
    """

    UNTUNED_ITERATIONS: ClassVar[int] = 150
    SEARCH_ITERATIONS: ClassVar[int] = 200
    """Trees at most in the first two searches."""
    STEP: ClassVar[int] = 50
    """Trees between two looks at the validation split."""
    PATIENCE: ClassVar[int] = 4
    """Looks without a better one before training ends."""

    def __init__(
        self, tuned: bool = True, max_iter: int = 600, search_rows: int = 50_000, n_threads: int | None = None
    ) -> None:
        super().__init__(n_threads)
        if max_iter < 1:
            raise ValueError(f"max_iter={max_iter} must be at least 1")
        self.tunes, self.max_iter, self.search_rows = tuned, max_iter, search_rows
        self._frequent: dict[str, np.ndarray] = {}

    def _prepare(self, train: TableArrays) -> None:
        for feature in train.features.categorical:
            if feature.multi_valued:
                counts = np.bincount(train.multi[feature.name].values, minlength=feature.num_rows)
                self._frequent[feature.name] = np.sort(np.argsort(-counts, kind="stable")[:MULTI_HOT])

    def _rows(self, task: _Task) -> _Rows:
        encoder = _Encoder(task.train.features, self._frequent)
        kept_N, kept_V = ~np.isnan(task.y_N), ~np.isnan(task.yv_N)
        y_N, yv_N = task.y_N[kept_N].astype(np.int64), task.yv_N[kept_V].astype(np.int64)
        x_ND, mask_D = encoder.fit_transform(task.train, kept_N, y_N, task.seed)
        valid = (np.zeros((0, 0)), yv_N) if not self.tunes else (encoder.transform(task.val)[kept_V], yv_N)
        return _Rows(encoder, (x_ND, y_N), valid, mask_D)

    def _num_settings(self, task: _Task) -> int:
        if not self.tunes:
            return 0
        encoder = _Encoder(task.train.features, {})
        has_categories = bool(encoder.small) or encoder.has_domain(task.train)
        return len(TREES) + len(PENALTIES) + len(_whole_settings(has_categories))

    def _tune_task(self, task: _Task, search: Search, part: tuple[float, float]) -> dict[str, Any]:
        if not self.tunes:
            return {}
        rows = self._rows(task)
        few = self._search_rows(rows.train[1], task.seed)
        sample = (rows.train[0][few], rows.train[1][few])
        limit = min(self.SEARCH_ITERATIONS, self.max_iter)
        begins, ends = part
        best: dict[str, Any] = {}
        at = -math.inf
        for grid in (TREES, PENALTIES):
            start = best
            for further in grid:
                options = {**start, **further}
                own = {**options, "learning_rate": 0.1}

                def few_trees(own: dict[str, Any] = own) -> float:
                    return self._boost(rows.mask_D, sample, rows.valid, task.seed, own, limit)[1]

                name, until = f"{task.name}, some rows: {_words(options)}", begins + SOME_ROWS * (ends - begins)
                quality = search.quality(name, few_trees, until)
                if quality is not None and quality > at:
                    best, at = options, quality
        chosen: dict[str, Any] = {}
        at = -math.inf
        for further in _whole_settings(bool(rows.mask_D.any())):
            options = {**best, **further}

            def all_trees(options: dict[str, Any] = options) -> float:
                return self._whole(rows, task.seed, options).quality

            name = f"{task.name}, all rows: {_words(options)}"
            quality = search.quality(name, all_trees, ends if chosen else math.inf)
            if quality is not None and quality > at:
                chosen, at = options, quality
        return chosen

    def _fit_task(self, task: _Task, settings: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        rows = self._rows(task)
        if not self.tunes:
            model = _booster(rows.mask_D, task.seed, {}, self.UNTUNED_ITERATIONS).fit(*rows.train)
            return (rows.encoder, _Boosted(model, 0)), {"iterations": self.UNTUNED_ITERATIONS}
        fitted = self._whole(rows, task.seed, settings)
        return (rows.encoder, fitted), {**settings, "iterations": fitted.iterations, "val_quality": fitted.quality}

    def _whole(self, rows: _Rows, seed: int, settings: Mapping[str, Any]) -> _Boosted:
        """Return trees on all rows, as many of them as are best on the validation split."""
        options = {name: value for name, value in settings.items() if name != "by_category"}
        mask_D = rows.mask_D if settings["by_category"] else np.zeros_like(rows.mask_D)
        model, _ = self._boost(mask_D, rows.train, rows.valid, seed, options, self.max_iter)
        by_number = [_quality(z_N, rows.valid[1]) for z_N in model.staged_decision_function(rows.valid[0])]
        return _Boosted(model, int(np.argmax(by_number)) + 1, max(by_number))

    def _search_rows(self, y_N: np.ndarray, seed: int) -> np.ndarray:
        rows = np.sort(np.random.default_rng(seed).permutation(len(y_N))[: self.search_rows])
        return rows if len(np.unique(y_N[rows])) == 2 else np.arange(len(y_N))

    def _boost(
        self,
        mask_D: np.ndarray,
        train: tuple[np.ndarray, np.ndarray],
        valid: tuple[np.ndarray, np.ndarray],
        seed: int,
        options: Mapping[str, Any],
        max_iter: int,
    ) -> tuple[Any, float]:
        """Trees until the validation split has seen no better number of them for a while, and its best quality."""
        model = _booster(mask_D, seed, options, 0)
        best, waited = -math.inf, 0
        for trees in (*range(self.STEP, max_iter, self.STEP), max_iter):
            model.set_params(max_iter=trees).fit(*train)
            quality = _quality(model.decision_function(valid[0]), valid[1])
            best, waited = (quality, 0) if quality > best else (best, waited + 1)
            if waited == self.PATIENCE:
                break
        return model, best

    def _decision(self, model: Any, arrays: TableArrays) -> np.ndarray:
        encoder, fitted = model
        return fitted.decision(encoder.transform(arrays))


class HistGradientBoostingUntuned(HistGradientBoosting):
    """``HistGradientBoosting`` with scikit-learn's defaults and 150 trees."""

    def __init__(self, n_threads: int | None = None) -> None:
        super().__init__(tuned=False, n_threads=n_threads)


@dataclass(frozen=True)
class _Rows:
    """The columns and labels of one task's rows, for training and validation; ``mask_D``: which hold categories."""

    encoder: _Encoder
    train: tuple[np.ndarray, np.ndarray]
    valid: tuple[np.ndarray, np.ndarray]
    mask_D: np.ndarray


def _whole_settings(has_categories: bool) -> list[dict[str, Any]]:
    return [options for options in WHOLE if options["by_category"] or has_categories]


def _booster(mask_D: np.ndarray, seed: int, options: Mapping[str, Any], trees: int) -> Any:
    from sklearn.ensemble import HistGradientBoostingClassifier

    return HistGradientBoostingClassifier(
        max_iter=max(trees, 1),
        warm_start=not trees,  # more trees are added to those there are
        early_stopping=False,  # its own split would be taken from the training rows
        categorical_features=mask_D if mask_D.any() else None,
        random_state=seed,
        **options,
    )


@dataclass(frozen=True)
class _Boosted:
    """Trained trees, and how many of them are used; 0: all."""

    model: Any
    iterations: int
    quality: float = math.nan

    def decision(self, x_ND: np.ndarray) -> np.ndarray:
        if not self.iterations:
            return self.model.decision_function(x_ND)
        return next(itertools.islice(self.model.staged_decision_function(x_ND), self.iterations - 1, None))


class _Encoder:
    """Columns for boosting, float32 (N, D): see ``HistGradientBoosting``. One a task: it reads the labels."""

    def __init__(self, features: Features, frequent: Mapping[str, np.ndarray]) -> None:
        self.features, self.frequent = features, frequent
        single = [f for f in features.categorical if not f.multi_valued]
        self.small = [i for i, f in enumerate(single) if f.num_rows <= MAX_CATEGORIES]
        self.large = [i for i, f in enumerate(single) if f.num_rows > MAX_CATEGORIES]
        sizes = [f.num_rows for f in single]
        self.sizes = [sizes[i] for i in self.large]
        self.rates: list[np.ndarray] = []
        self.counts: list[np.ndarray] = []

    def fit_transform(
        self, train: TableArrays, kept_N: np.ndarray, y_N: np.ndarray, seed: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """The columns of the labelled rows, and which of them hold categories, bool (D,)."""
        ids_NF = train.ids_NF[kept_N][:, self.large]
        # The mean of a value leaves out the row's own fold, or rare values would give the label away.
        fold_N = np.random.default_rng(seed).permutation(len(y_N)) % FOLDS
        rates_NF = np.empty(ids_NF.shape)
        for f, size in enumerate(self.sizes):
            self.counts.append(np.bincount(ids_NF[:, f], minlength=size))
            self.rates.append(_rates(ids_NF[:, f], y_N, size))
            for fold in range(FOLDS):
                mine, others = fold_N == fold, fold_N != fold
                rates_NF[mine, f] = _rates(ids_NF[others, f], y_N[others], size)[ids_NF[mine, f]]
        x_ND = self._columns(train, rates_NF, kept_N)
        mask_D = np.zeros(x_ND.shape[1], dtype=bool)
        C = train.dense_NC.shape[1]
        mask_D[C : C + len(self.small) + self.has_domain(train)] = True
        return x_ND, mask_D

    def transform(self, arrays: TableArrays) -> np.ndarray:
        rates = [r[i] for r, i in zip(self.rates, arrays.ids_NF[:, self.large].T, strict=True)]
        rates_NF = np.stack(rates, 1) if rates else np.zeros((len(arrays), 0))
        return self._columns(arrays, rates_NF, np.ones(len(arrays), dtype=bool))

    def has_domain(self, arrays: TableArrays) -> bool:
        return arrays.domain_N is not None and self.features.num_domains <= MAX_CATEGORIES

    def _columns(self, arrays: TableArrays, rates_NF: np.ndarray, kept_N: np.ndarray) -> np.ndarray:
        parts = [arrays.dense_NC[kept_N], arrays.ids_NF[kept_N][:, self.small]]
        if arrays.domain_N is not None:
            parts.append(arrays.domain_N[kept_N, None])
        if self.large:
            ids_NF = arrays.ids_NF[kept_N][:, self.large]
            parts += [rates_NF, np.stack([np.log1p(c[i]) for c, i in zip(self.counts, ids_NF.T, strict=True)], 1)]
        for name, values in self.frequent.items():
            column = arrays.multi[name]
            row = np.repeat(np.arange(len(arrays)), column.lengths_N)
            hot = np.zeros((len(arrays), len(values)), dtype=np.float32)
            place = np.searchsorted(values, column.values)
            found = values[np.minimum(place, len(values) - 1)] == column.values
            hot[row[found], place[found]] = 1
            parts += [column.lengths_N[kept_N, None], hot[kept_N]]
        return np.concatenate([p.astype(np.float32) for p in parts], axis=1)


def _rates(ids_N: np.ndarray, y_N: np.ndarray, size: int) -> np.ndarray:
    """The mean label of each value, as if ``SMOOTHING`` more examples of it were like the rest."""
    sums, counts = np.bincount(ids_N, weights=y_N, minlength=size), np.bincount(ids_N, minlength=size)
    return (sums + SMOOTHING * y_N.mean()) / (counts + SMOOTHING)


# ---- linear model


class LogisticRegression(_PerTask):
    """scikit-learn's ``LogisticRegression`` on a sparse matrix, one a task.

    Categorical columns are one-hot, multi-valued ones divided by their number of values; continuous columns are one-hot
    by the quantile bins of the training split, with a bin for missing values, and stand beside that standardised. The
    strength of the L2 penalty is tuned on the validation split's AUC. Nothing is drawn: seeds give the same model.

    Args:
        strengths: values of scikit-learn's C, the inverse penalty, to try.
        max_iter: of L-BFGS.
        n_threads: see ``_PerTask``.
    """

    def __init__(
        self, strengths: tuple[float, ...] = (0.01, 0.1, 1.0), max_iter: int = 200, n_threads: int | None = None
    ) -> None:
        super().__init__(n_threads)
        if not strengths or any(not c > 0 for c in strengths):
            raise ValueError(f"strengths={strengths} must be positive numbers")
        self.strengths, self.max_iter = strengths, max_iter

    def _num_settings(self, task: _Task) -> int:
        return len(self.strengths)

    def _tune_task(self, task: _Task, search: Search, part: tuple[float, float]) -> dict[str, Any]:
        best, at = None, -math.inf
        for strength in sorted(self.strengths):

            def tried(strength: float = strength) -> float:
                return self._fit_task(task, {"C": strength})[1]["val_quality"]

            quality = search.quality(f"{task.name}: C={strength:g}", tried, math.inf if best is None else part[1])
            if quality is not None and quality > at:
                best, at = strength, quality
        return {"C": best}

    def _fit_task(self, task: _Task, settings: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.linear_model import LogisticRegression as Linear

        kept_N, kept_V = ~np.isnan(task.y_N), ~np.isnan(task.yv_N)
        x, xv = design_matrix(task.train)[kept_N], design_matrix(task.val)[kept_V]
        model = Linear(C=settings["C"], max_iter=self.max_iter)
        with warnings.catch_warnings():
            # The best strength is chosen by validation; an optimiser cut short is one more regulariser.
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit(x, task.y_N[kept_N].astype(np.int64))
        quality = _quality(model.decision_function(xv), task.yv_N[kept_V])
        return (model.coef_[0].copy(), float(model.intercept_[0])), {"C": settings["C"], "val_quality": quality}

    def _decision(self, model: Any, arrays: TableArrays) -> np.ndarray:
        weights, bias = model
        return np.asarray(design_matrix(arrays) @ weights + bias, dtype=np.float64)


def design_matrix(arrays: TableArrays) -> Any:
    """The columns of ``LogisticRegression`` as a scipy CSR matrix of float32, (N, D); D follows from the features."""
    from scipy import sparse

    N, features = len(arrays), arrays.features
    places, sizes = [], []
    single = [f for f in features.categorical if not f.multi_valued]
    for feature, ids_N in zip(single, arrays.ids_NF.T, strict=True):
        places.append(ids_N)
        sizes.append(feature.num_rows)
    if arrays.domain_N is not None:
        places.append(arrays.domain_N)
        sizes.append(features.num_domains)
    for column, values_N in zip(features.continuous, arrays.dense_NC.T, strict=True):
        bins = len(column.quantiles) + 1
        missing_N = np.isnan(values_N)
        places.append(np.where(missing_N, bins, np.searchsorted(np.asarray(column.quantiles), values_N)))
        sizes.append(bins + 1)
    parts = []
    if places:
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
    for feature in features.categorical:
        if feature.multi_valued:
            several = arrays.multi[feature.name]
            shares = np.repeat(1.0 / np.maximum(several.lengths_N, 1), several.lengths_N).astype(np.float32)
            pointers = np.r_[0, np.cumsum(several.lengths_N)]
            parts.append(sparse.csr_matrix((shares, several.values, pointers), shape=(N, feature.num_rows)))
    return sparse.hstack(parts, format="csr")
