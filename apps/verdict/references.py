"""Boosted trees, a linear model and a blend beside the networks of a verdict on a table, and each task's best model.

Each has a search of its own, of settings on the validation split, within a share of the minutes. What was tried is
kept, so that a killed verdict goes on with it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch import seed_everything

from apps.base.files import read_json, replacing, write_json
from apps.base.progress import bar, say
from apps.base.quiet import quiet
from apps.compare.experiment import Experiment
from apps.compare.systems import SPARSE, label
from apps.equal_cost.comparison import Search
from apps.report.intervals import by_group, crossed_interval, mean_interval
from apps.verdict.schedule import LEAST_SEEDS
from apps.verdict.work import Finished

TREES = ("lightgbm", "hist_gradient_boosting")
"""Boosted trees, of which the first one that is installed is trained."""

LINEAR = "logistic_regression"

BLEND = "default_blend"
"""A dense network with trees beside it."""

SHARES = {"trees": 0.06, LINEAR: 0.03, BLEND: 0.08}
"""Part of the minutes for the search of each."""

RESERVED = 0.22
"""Part of the minutes that is kept for the references: their searches, and training with what was found."""

ROOM = "references"


@dataclass(frozen=True)
class OfTask:
    """The quality of one model on one task.

    Attributes:
        task, model: names of the task and the model.
        metric: name of the quality, such as "r2"; a larger one is better.
        values_SN: values of each seed (S) and test row (N), whose mean is the quality.
    """

    task: str
    model: str
    metric: str
    values_SN: np.ndarray

    @property
    def quality(self) -> float:
        return float(self.values_SN.mean())


def reference_names(model: Any) -> list[str]:
    """Return the references that a model's baselines have; none where it is no model of a table."""
    offered = {name for name, own in model.comparison.baselines().items() if own.build is not None}
    trees = next((name for name in TREES if name in offered), None)
    return [name for name in (trees, LINEAR, BLEND) if name is not None and name in offered]


class References:
    """The references of a verdict.

    Args:
        experiment: the configuration.
        names: ``reference_names``.
        output: folder of the verdict.
        minutes: minutes of the verdict.
        seed: first seed of the final runs.
        num_values: test rows that the networks are evaluated on, the first of the split.
    """

    def __init__(
        self, experiment: Experiment, names: Sequence[str], output: Path, minutes: float, seed: int, num_values: int
    ) -> None:
        self.experiment, self.names, self.minutes, self.seed = experiment, names, minutes, seed
        self.folder, self.num_values = output / ROOM, num_values

    def do(self) -> list[OfTask]:
        """Search, train and test what is not finished yet, and return the quality of each model on each task."""
        return [of_task for name in self.names for of_task in self._one(name)]

    def _one(self, name: str) -> list[OfTask]:
        folder = self.folder / name
        result = read_json(folder / "result.json")
        if result is None:
            folder.mkdir(parents=True, exist_ok=True)
            with quiet(own_notes=False), bar(label(name)):
                result = self._train(name, folder)
            write_json(folder / "result.json", result)
            shown = ", ".join(f"{metric}_{task} {quality:.4g}" for task, (metric, quality) in result["tasks"].items())
            say(f"[{label(name)}] {shown}")
        values_tN = np.load(folder / "values.npy", allow_pickle=False)
        tasks = zip(result["tasks"].items(), values_tN, strict=True)
        return [OfTask(task, name, metric, values_N[None]) for (task, (metric, _)), values_N in tasks]

    def _train(self, name: str, folder: Path) -> dict[str, Any]:
        seed_everything(self.seed, verbose=False)
        model, data = self.experiment.build(name)
        data.prepare_data()
        data.setup("fit")
        path, minutes = folder / "tried.json", self.minutes * SHARES.get(name, SHARES["trees"])

        def keep(tried: dict[str, dict[str, float]]) -> None:
            write_json(path, tried)

        search = Search(minutes, read_json(path), keep)
        model.fit(data, self.seed, model.tune(data, self.seed, search))
        data.setup("test")
        by_task = model.task_values(data, "test")
        with replacing(folder / "values.npy", "wb") as file:
            np.save(file, np.stack([values_N[: self.num_values] for _, values_N in by_task.values()]))
        tasks = {task: (metric, float(values_N.mean())) for task, (metric, values_N) in by_task.items()}
        return {"tasks": tasks, "settings": model.chosen, "tried": len(search.tried)}


def by_task(finished: Sequence[Finished], references: Sequence[OfTask], dense: str) -> dict[str, dict[str, OfTask]]:
    """Return the quality of each model, by task and name of the model.

    Args:
        finished: the networks' runs.
        references: the others.
        dense: name of the dense network.
    """
    models: dict[str, dict[str, OfTask]] = {}
    group_N = finished[0].group_N
    for place, name in enumerate((SPARSE, dense)):
        for task in finished[0].tasks[place]:
            values_SN = by_group(np.stack([f.tasks[place][task][1] for f in finished]), group_N)
            models.setdefault(task, {})[name] = OfTask(task, name, finished[0].tasks[place][task][0], values_SN)
    for own in references:
        models[own.task][own.model] = replace(own, values_SN=by_group(own.values_SN, group_N))
    return models


def best_model(task: str, models: Mapping[str, OfTask], dense: str) -> str:
    """Return a sentence on the best model of a task, and on what sparse adds to the networks.

    Fewer seeds of the networks than decide a verdict name no model the better one.
    """
    ranked = sorted(models.values(), key=lambda own: own.quality, reverse=True)
    best, second, networks = ranked[0], ranked[1], [own for own in ranked if own.model in (SPARSE, dense)]
    few = len(models[SPARSE].values_SN) < LEAST_SEEDS
    low, high = _gain(best, second)
    qualities = ", ".join(f"{label(own.model)} {own.quality:.4g}" for own in ranked)
    ends = f"95 % interval {low:+.3g} to {high:+.3g}" if math.isfinite(low) else "one value gives no interval"
    if low > 0 and not few:
        line = f"{task}: {label(best.model)} is best ({best.metric}: {qualities}; over the second {ends})."
    else:
        line = f"{task}: no model is shown to be best ({best.metric}: {qualities}; the first over the second {ends})."
    low, high = _gain(models[SPARSE], models[dense])
    adds = "sparse is better than dense" if low > 0 else "dense is better than sparse" if high < 0 else ""
    own = adds or "sparse adds nothing that is shown"
    if few:
        return f"{line} Fewer than {LEAST_SEEDS} seeds decide nothing."
    return line if best in networks and adds else f"{line} Of the networks, {own}."


def _gain(one: OfTask, other: OfTask) -> tuple[float, float]:
    """Return the ends of the interval of a difference, over seeds and test rows; a model of one seed is the same with
    each, and two of them have one over test rows."""
    seeds = max(len(one.values_SN), len(other.values_SN))
    own, than = (np.broadcast_to(m.values_SN, (seeds, m.values_SN.shape[1])) for m in (one, other))
    interval = mean_interval((own - than)[0].tolist()) if seeds == 1 else crossed_interval(own - than)
    if interval.half_width is None:
        return -math.inf, math.inf
    return interval.low, interval.high
