"""The base of the baselines: a model and its settings for each task, tuned on the validation split.

They are an ``Estimator`` of ``apps.equal_cost.comparison``: ``tune`` finds the settings on the validation split,
``fit`` trains with them, and the metrics have the names that the network logs. Only ``evaluate`` reads the test split.

Threads: boosting and the sparse matrix multiplications run in as many as torch uses here (``n_threads=None``), so that
several runs at a time share the cores as networks do. Results depend on the seed, not on the number of threads, but for
the order in which boosting sums floats.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from apps.base.checks import check_at_least
from apps.equal_cost.comparison import Search
from apps.recsys.kinds import Kind, Ordinal, Outputs, Regression, kind_of
from apps.recsys.metrics import MultiTaskMetrics
from apps.recsys.tables.outputs import values_by_task
from apps.recsys.tables.rows.arrays import MultiValued, TableArrays, gather
from apps.recsys.tables.tasks import step_labels

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TaskData:
    """The training and validation rows of one task.

    Attributes:
        name: name of the task.
        kind: kind of the target.
        train, val: the columns of all rows.
        kept_N, kept_V: the rows that have a label.
        y_N, yv_N: the labels of these rows.
        weight_N: weights of the training rows that have a label; None: 1.
        seed: seed of the training's draws.
    """

    name: str
    kind: Kind
    train: TableArrays
    kept_N: np.ndarray
    y_N: np.ndarray
    val: TableArrays
    kept_V: np.ndarray
    yv_N: np.ndarray
    weight_N: np.ndarray | None
    seed: int


class EncodedTask(NamedTuple):
    """A task's labeled rows as a model takes them.

    Attributes:
        task: the task.
        columns: how a table becomes ``x``.
        x, xv: training and validation rows, (N, D).
    """

    task: TaskData
    columns: Any
    x: np.ndarray
    xv: np.ndarray


@dataclass(frozen=True)
class Constant:
    """Replaces the model of a task whose training labels have only one class."""

    rate: float

    @property
    def logit(self) -> float:
        p = min(max(self.rate, 1e-6), 1 - 1e-6)
        return math.log(p / (1 - p))


class PerTask:
    """One model a task.

    A subclass brings ``num_settings``, ``tune_task``, ``fit_task`` and ``decision``.

    Args:
        n_threads: threads of OpenMP and BLAS while training; None: as many as torch uses here.
        steps: whether the tasks are steps, whose labels are filled in as `tasks.step_labels` does.
    """

    tunes: bool = True
    """Whether there are settings to be searched, by ``tune``."""

    kind: str = "trees"
    """What a leaderboard calls the model."""

    def __init__(self, n_threads: int | None = None, steps: bool = False) -> None:
        check_at_least(1, n_threads=n_threads)
        self.n_threads, self.steps = n_threads, steps
        self.models: dict[str, Any] = {}
        self.chosen: dict[str, dict[str, Any]] = {}
        """The settings of each task's model."""

    def tune(self, data: Any, seed: int, search: Search | None = None) -> dict[str, dict[str, Any]]:
        """Find the settings of each task's model: trained on the training split, evaluated on the validation split.

        Args:
            data: data module that is set up.
            seed: seed of the search's draws.
            search: how long it may take, and the settings tried before; None: as long as it takes. Each task has an
                equal part of the time, and what one leaves goes to the next. The first setting is tried in any case.

        Returns:
            By task, plain values for ``fit``; empty for a task whose training labels have only one class.

        Raises:
            ValueError: a split without rows.
        """
        search = search or Search()
        settings: dict[str, dict[str, Any]] = {}
        with self.threads():
            tasks = self._tasks(data, seed)
            search.total = sum(self.num_settings(task) for task in tasks.values() if isinstance(task, TaskData))
            for t, (name, task) in enumerate(tasks.items()):
                part = (t / len(tasks), (t + 1) / len(tasks))
                settings[name] = self.tune_task(task, search, part) if isinstance(task, TaskData) else {}
        return settings

    def fit(self, data: Any, seed: int, settings: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        """Train on the training split; the validation split decides for how long.

        Args:
            data: data module that is set up.
            seed: seed of the training's draws.
            settings: result of ``tune``; None: tune now.

        Raises:
            ValueError: a split without rows.
        """
        settings = self.tune(data, seed) if settings is None else settings
        with self.threads():
            for name, task in self._tasks(data, seed).items():
                if isinstance(task, Constant):
                    self.models[name], self.chosen[name] = task, {"constant": task.rate}
                else:
                    self.models[name], self.chosen[name] = self.fit_task(task, settings[name])
                _logger.info("%s, %s: %s", type(self).__name__, name, _words(self.chosen[name]))

    def evaluate(self, data: Any, split: Literal["val", "test"]) -> Mapping[str, float]:
        """Return the metrics of ``MultiTaskMetrics``, as the module logs them, without the split."""
        with self.threads():
            arrays = gather(data, split)
            z_Nt = self.predicted(data, split, arrays)
        outputs = Outputs(arrays.features.target_of_task)
        metrics = MultiTaskMetrics(arrays.features.tasks, grouped=arrays.group_N is not None, outputs=outputs)
        groups = None if arrays.group_N is None else torch.from_numpy(arrays.group_N)
        cold = None if arrays.cold_N is None or split != "test" else torch.from_numpy(arrays.cold_N)
        metrics.update(torch.from_numpy(z_Nt), self.labels(arrays), groups, cold)
        return {name: float(value) for name, value in metrics.compute().items()}

    def task_values(self, data: Any, split: Literal["val", "test"]) -> dict[str, tuple[str, np.ndarray]]:
        """Return, by task, the name of its main metric and values by row whose mean it is, in the table's order."""
        arrays = gather(data, split)
        with self.threads():
            z_NZ = torch.from_numpy(self.predicted(data, split, arrays)).double()
        outputs = Outputs(arrays.features.target_of_task)
        return values_by_task(arrays.features.tasks, outputs, z_NZ, self.labels(arrays).double().numpy())

    def predicted(self, data: Any, split: Literal["val", "test"], arrays: TableArrays) -> np.ndarray:
        """Return the tasks' outputs for a split, float64 (N, Z), whose rows ``arrays`` are."""
        return self.logits(arrays)

    def logits(self, arrays: TableArrays) -> np.ndarray:
        """Return the tasks' outputs, float64 (N, Z), one logit per task if all are binary."""
        models = [self.models[name] for name in arrays.features.tasks]
        of_tasks = [
            np.full(len(arrays), m.logit) if isinstance(m, Constant) else self.decision(m, arrays) for m in models
        ]
        return np.column_stack(of_tasks)

    def _tasks(self, data: Any, seed: int) -> dict[str, TaskData | Constant]:
        """Return the rows of each task, or the rate of one whose training labels have only one class."""
        return self.tasks_of(gather(data, "train"), gather(data, "val"), seed)

    def tasks_of(self, train: TableArrays, val: TableArrays, seed: int) -> dict[str, TaskData | Constant]:
        """Return the tasks of some training and validation rows, as ``_tasks`` does."""
        label_Nt, label_val_Nt = self.labels(train).numpy(), self.labels(val).numpy()
        tasks: dict[str, TaskData | Constant] = {}
        targets = zip(train.features.tasks, train.features.target_of_task, strict=True)
        for t, (name, target) in enumerate(targets):
            kept_N, kept_V = ~np.isnan(label_Nt[:, t]), ~np.isnan(label_val_Nt[:, t])
            y_N, yv_N = label_Nt[kept_N, t], label_val_Nt[kept_V, t]
            classes = np.unique(y_N)
            if len(classes) < 2:
                tasks[name] = Constant(float(classes[0]) if len(classes) else 0.5)
            else:
                weight_N = None if train.weight_Nt is None else train.weight_Nt[kept_N, t]
                tasks[name] = TaskData(name, kind_of(target), train, kept_N, y_N, val, kept_V, yv_N, weight_N, seed)
        return tasks

    def labels(self, arrays: TableArrays) -> torch.Tensor:
        label_Nt = torch.from_numpy(arrays.label_Nt)
        return step_labels(label_Nt) if self.steps else label_Nt

    def threads(self) -> Any:
        from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

        return threadpool_limits(self.n_threads or torch.get_num_threads())

    def num_settings(self, task: TaskData) -> int:
        """Return how many settings the whole search of a task has."""
        raise NotImplementedError

    def tune_task(self, task: TaskData, search: Search, part: tuple[float, float]) -> dict[str, Any]:
        """Return the best settings; ``part`` are the shares of the search's time at which it may start and must end."""
        raise NotImplementedError

    def fit_task(self, task: TaskData, settings: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Return the task's model, and its settings with the values that the training chose."""
        raise NotImplementedError

    def decision(self, model: Any, arrays: TableArrays) -> np.ndarray:
        """Return the outputs of a model of ``fit_task``, float64 (N,), or (N, width) of several."""
        raise NotImplementedError


def best_of(
    candidates: Iterable[dict[str, Any]],
    quality_of: Callable[[dict[str, Any]], float],
    search: Search,
    title: str,
    until: float,
    one_at_least: bool = False,
) -> tuple[dict[str, Any], float]:
    """Return the best of the settings that there was time to try, and its quality; {} and -inf where there was none.

    Args:
        candidates: the settings.
        quality_of: trains with one.
        search: keeps what was tried, under ``title`` and the settings.
        title: what is trained.
        until: share of the search's time that may have passed before a setting is begun.
        one_at_least: try the first one in any case.
    """
    best: dict[str, Any] = {}
    at = -math.inf
    for options in candidates:
        limit = math.inf if one_at_least and not best else until
        quality = search.quality(f"{title}: {_words(options)}", lambda options=options: quality_of(options), limit)  # type: ignore[misc]
        if quality is not None and quality > at:
            best, at = options, quality
    return best, at


def quality_of(kind: Kind, z_N: np.ndarray, y_N: np.ndarray) -> float:
    """Return the tuning objective: the task's main metric, such as the AUC, or if validation cannot determine it (such
    as with one class) the log likelihood, or the squared error's negative.

    Args:
        kind: kind of the target.
        z_N: outputs, (N,) or (N, width).
        y_N: labels.
    """
    values = kind.metrics(z_N.reshape(len(y_N), -1), y_N).values()
    if not math.isnan(values[kind.main_metric]):
        return values[kind.main_metric]
    loss = values.get("log_loss", values.get("rmse", math.nan))
    return 0.0 if math.isnan(loss) else -loss


def outputs_of(kind: Kind, raw: np.ndarray, classes: np.ndarray | None = None) -> np.ndarray:
    """Return a model's predictions as the outputs of a task's kind, float64 (N,) or (N, width).

    Args:
        kind: kind of the target.
        raw: logits of a classifier, (N,) of two classes, else (N, C); or predicted numbers (N,).
        classes: places of the classes that a classifier has seen; None: it is none, or binary.
    """
    target = kind.target
    if target.kind == "binary":
        return raw
    if isinstance(kind, Regression):
        return np.asarray(kind.outputs_of(raw))
    assert classes is not None
    if raw.ndim == 1:
        raw = np.column_stack((np.zeros(len(raw)), raw))
    logits = np.full((len(raw), len(target.shares)), -30.0)  # a class that is not seen has next to no probability
    logits[:, classes] = raw
    if not isinstance(kind, Ordinal):
        return logits
    return kind.outputs_of(torch.from_numpy(logits).softmax(-1)).numpy()


def _words(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in options.items())


def sparse_values(column: MultiValued, num_rows: int, weights: np.ndarray | None = None) -> Any:
    """Return a multi-valued column as a scipy CSR matrix (N, ``num_rows``), with ``weights`` of its values or 1."""
    from scipy import sparse

    weights = np.ones(len(column.values), dtype=np.float32) if weights is None else weights
    pointers = np.r_[0, np.cumsum(column.lengths_N)]
    return sparse.csr_matrix((weights, column.values, pointers), shape=(len(column.lengths_N), num_rows))
