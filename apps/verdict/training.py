"""One run of a verdict: a system trained for some steps at one rate with one seed, and evaluated.

A finished run is one JSON file, next to which it keeps its values by example: of the validation in a search, else of
the test. An unfinished one is done again: runs are short.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.utilities import move_data_to_device
from torch.utils.data import DataLoader

import core
from apps.base.files import replacing
from apps.base.quiet import quiet
from apps.compare.experiment import Experiment, check_validation, length_of
from apps.compare.training import TRAINS_ONLY, interruptible
from apps.data.loader import as_it_is
from apps.runner.runner import Budget, BudgetOver
from apps.runner.unit import Unit
from apps.runner.workers import Progress, unseen
from apps.train.cost.flops import num_examples
from apps.train.step.balance import routing_metrics
from apps.train.step.module import SparseModule
from apps.train.watch.progress import routing_figures
from apps.verdict.schedule import CHECKS, Speed
from core.convert.read.calls import evaluating

TASKS = "tasks.npy"
"""Keeps the test values of each task."""

GROUPS = "groups.npy"
"""Keeps the user of each test row."""

BLOCKS = 16
"""Parts of the test split that stand for its examples where a module tells its quality of whole passes alone."""


@dataclass(frozen=True)
class Evaluated:
    """The quality of a model on some examples.

    Attributes:
        name: name of the quality, such as "auc".
        values_N: float64 (N,), whose mean is the quality: one per example, or one per block of batches.
        higher_is_better: True where a larger quality is better.
        routing: figures of the routing, means over the layers; empty without experts.
        tasks: metric and values (N,) of each task of a table; empty for other models.
        group_N: int64 (N,), the user of each row of a table that names one.
    """

    name: str
    values_N: np.ndarray
    higher_is_better: bool
    routing: Mapping[str, float] = field(default_factory=dict)
    tasks: Mapping[str, tuple[str, np.ndarray]] = field(default_factory=dict)
    group_N: np.ndarray | None = None

    @property
    def quality(self) -> float:
        return float(self.values_N.mean())


def evaluate(
    model: Any, trainer: Trainer, loader: Iterable[Any], most: int | None, budget: Budget, stage: str = "val"
) -> Evaluated:
    """Return the quality of ``model`` on the first ``most`` batches of ``loader``.

    The module's own values by example are taken if it has them. Else ``stage`` says whether its validation ("val") or
    its test ("test") is run; a test is run by blocks of batches, whose qualities are the values then.

    Args:
        model: a trained ``SparseModule``, or an ``OwnModel``.
        trainer: the trainer that trained it.
        loader: batches, in the same order for every model.
        most: None: all batches.
        budget: checked after each batch.
        stage: "val" or "test".

    Raises:
        BudgetOver: the time is up.
        ValueError: the data have no batch, or the module does not log its quality.
    """
    batches = itertools.islice(loader, most)
    if isinstance(model, SparseModule):
        evaluated = _by_example(model, trainer, batches, budget)
        if evaluated is not None:
            return evaluated
        batches = itertools.islice(loader, most)
    return _by_block(model, trainer, list(batches), budget, stage)


def _by_example(model: Any, trainer: Trainer, batches: Iterator[Any], budget: Budget) -> Evaluated | None:
    device = trainer.strategy.root_device
    outs, stats = [], core.RoutingStats({})
    model.to(device)
    with evaluating(model), torch.no_grad(), trainer.precision_plugin.forward_context():
        for batch in batches:
            with core.record(model) as tape:
                outs.append(model.task_loss(move_data_to_device(batch, device)))
            stats = stats + core.RoutingStats.from_tape(tape)
            budget.check()
    if not outs:
        raise ValueError("a split has no batch to evaluate")
    comparison = model.comparison
    values = comparison.example_values(outs)
    if values is None:
        return None
    figures = {name.partition("/")[2]: float(value) for name, value in routing_metrics(stats).items()}
    means = {name: value for name, value in figures.items() if "/" not in name}
    users = [out.groups for out in outs if out.groups is not None]
    group_N = torch.cat(users).cpu().numpy() if users else None
    return Evaluated(
        values.name, values.values_N.numpy(), values.higher_is_better, means, comparison.task_values(outs), group_N
    )


def _by_block(model: Any, trainer: Trainer, batches: list[Any], budget: Budget, stage: str) -> Evaluated:
    if not batches:
        raise ValueError("a split has no batch to evaluate")
    name = model.test_monitor if stage == "test" else model.monitor
    trainer.limit_val_batches = 1.0  # it is 0 while the model is trained
    run = trainer.test if stage == "test" else trainer.validate
    count = min(len(batches), BLOCKS if stage == "test" else 1)
    values, figures = [], []
    for block in range(count):
        # Every count-th batch, so that blocks differ by at most one batch in size.
        parts: Any = batches[block::count]
        loader: DataLoader[Any] = DataLoader(parts, batch_size=None, collate_fn=as_it_is)
        with _batch_hooks(trainer.datamodule, model.module):  # type: ignore[attr-defined]
            logged = run(model.module, dataloaders=loader, verbose=False)[0]
        if name not in logged:
            raise ValueError(f"{stage} of {type(model.module).__name__} logs no {name!r}: it logs {', '.join(logged)}")
        values.append(float(logged[name]))
        start = f"{stage}/routing/"
        figures.append({k.removeprefix(start): v for k, v in logged.items() if k.startswith(start)})
        budget.check()
    means = {k: sum(own[k] for own in figures) / count for k in figures[0] if "/" not in k}
    is_better = model.monitor_mode == "max"
    return Evaluated(name.rpartition("/")[2], np.array(values, np.float64), is_better, means)


@contextlib.contextmanager
def _batch_hooks(data: LightningDataModule, module: LightningModule) -> Iterator[None]:
    """Lend ``module`` the batch hooks of ``data``: of loaders without a data module Lightning asks the module alone."""
    hooks = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")
    own = [name for name in hooks if getattr(type(data), name) is not getattr(LightningDataModule, name)]
    for name in own:
        setattr(module, name, getattr(data, name))
    try:
        yield
    finally:
        for name in own:
            delattr(module, name)


VALIDATION_NEED = "the learning rates are chosen by"
"""What a verdict needs a validation split for, as messages say it."""

_TRIAL_STEPS, _LEAST_TRIAL_STEPS, _TRIAL_SHARE, _TRIAL_SECONDS = 25, 3, 0.01, 3.0
_MOST_SAMPLE = 2000


@dataclass(frozen=True)
class VerdictRun(Unit):
    """A training of a verdict; a rate of None is the model's own, which has no name.

    Attributes:
        steps: optimizer steps.
        kind: "search", which is validated, "final", which is tested, at equal steps, or "timed", at equal time.
    """

    steps: int
    kind: Literal["search", "final", "timed"]

    ROOM, KEY = "runs", "run"

    @property
    def name(self) -> str:
        return self.named(self.kind, f"-{self.steps}steps")

    @property
    def is_search(self) -> bool:
        return self.kind == "search"

    def task_values(self, output: Path) -> dict[str, tuple[str, np.ndarray]]:
        """Return metric and values of each task that a final run has kept; none of other models."""
        names = (self.read(output) or {}).get("tasks", {})
        values_tN = np.load(self.folder(output) / TASKS, allow_pickle=False) if names else ()
        return {task: (metric, own_N) for (task, metric), own_N in zip(names.items(), values_tN, strict=True)}

    def group_N(self, output: Path) -> np.ndarray | None:
        """Return the user of each test row of a final run, if the rows have users."""
        path = self.folder(output) / GROUPS
        return np.load(path, allow_pickle=False) if path.exists() else None

    def values(self, output: Path) -> np.ndarray:
        """Return the values by example that a finished run has kept; none of one that diverged.

        Raises:
            ValueError: they are missing, or damaged.
        """
        path = self.folder(output) / "values.npy"
        result = self.read(output)
        if result is not None and result["quality"] is None:
            return np.empty(0)
        try:
            return np.asarray(np.load(path, allow_pickle=False), np.float64)
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(
                f"{path} cannot be read ({error or type(error).__name__}), though its run is finished: delete "
                f"{path.parent} to have it made again"
            ) from None


class Best:
    """Keeps the weights that validate best.

    Args:
        model: the model.
        batches: function that returns the batches of an evaluation.
        steps: steps of the training, of which ``CHECKS`` are evaluated, evenly spread, the last one too.
        budget: checked after each batch.
    """

    def __init__(self, model: SparseModule, batches: Callable[[], Iterable[Any]], steps: int, budget: Budget) -> None:
        self.model, self.batches, self.budget = model, batches, budget
        self._at = {math.ceil(steps * (i + 1) / CHECKS) for i in range(CHECKS)}
        self._quality = -math.inf
        self._weights: dict[str, torch.Tensor] | None = None

    def check(self, step: int, trainer: Trainer) -> None:
        """Evaluate the weights if it is time, and keep them if they are the best so far."""
        if step not in self._at:
            return
        self._at.remove(step)
        found = _by_example(self.model, trainer, iter(self.batches()), self.budget)
        if found is None:
            self._at.clear()
            return
        quality = found.quality if found.higher_is_better else -found.quality
        if quality > self._quality:
            self._quality, state = quality, self.model.state_dict()
            self._weights = {name: value.detach().clone() for name, value in state.items()}

    def restore(self) -> None:
        """Give the model the kept weights."""
        if self._weights is not None:
            self.model.load_state_dict(self._weights)


class Pace(Callback):
    """Measures the seconds of a training, and stops it when the budget is used up.

    Args:
        budget: checked after each step.
        progress: is called with the steps and the use of the experts.
        best: called after each step; its seconds are none of the training's.
        until: ends a trial: a function of the steps done and the seconds since the first one.

    Attributes:
        steps: optimizer steps done.
    """

    def __init__(
        self,
        budget: Budget,
        progress: Progress,
        until: Callable[[int, float], bool] = lambda steps, seconds: False,
        best: Best | None = None,
    ) -> None:
        self.budget, self.progress, self.until, self.best = budget, progress, until, best
        self.steps = 0
        self.is_over = False
        self._began = self._first = self._last = budget.clock()
        self._first_steps = 0

    @property
    def seconds_per_step(self) -> float:
        """Return the seconds of a step, without the first one where there are more: it warms up."""
        counted = self.steps - self._first_steps
        if counted > 0:
            return (self._last - self._first) / counted
        return (self._last - self._began) / max(self.steps, 1)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._began = self.budget.clock()

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self.steps, self._last = trainer.global_step, self.budget.clock()
        if not self._first_steps and self.steps:
            self._first, self._first_steps = self._last, self.steps
        self.progress(self.steps, trainer.max_steps, routing_figures(trainer.callback_metrics))
        try:
            self.budget.check()
        except BudgetOver:  # an exception inside the loop would be Lightning's business
            self.is_over = True
        if self.best is not None and not self.is_over:
            try:
                self.best.check(self.steps, trainer)
            except BudgetOver:
                self.is_over = True
            passed = self.budget.clock() - self._last
            self._first, self._began, self._last = (at + passed for at in (self._first, self._began, self._last))
        if self.is_over or (self._first_steps and self.until(self.steps, self._last - self._first)):
            trainer.should_stop = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.best is not None:
            self.best.restore()
        if torch.cuda.is_available():  # steps of a GPU are asked for before they are done
            torch.cuda.synchronize()
            self._last = self.budget.clock()


def do(
    experiment: Experiment,
    run: VerdictRun,
    output: Path,
    budget: Budget,
    most_batches: int | None,
    progress: Progress = unseen,
) -> dict[str, Any]:
    """Do ``run``, write its plain result into ``result.json`` of its folder, and return it.

    Args:
        experiment: the configuration.
        run: the run.
        output: folder of the verdict.
        budget: the seconds that are left.
        most_batches: maximum number of batches per evaluation; None: all.
        progress: is called with the steps done and to do, and the use of the experts.

    Raises:
        BudgetOver: the time was up before the run was finished; nothing of it is kept.
        NonFiniteError: a final run diverged; a run of the search records it.
    """

    def work() -> dict[str, Any]:
        checked = 0 if run.is_search else most_batches
        model, data, trainer, pace = _fit(
            experiment, run.system, run.rate, run.steps, budget, progress, checked=checked
        )
        if run.is_search:
            validated = evaluate(model, trainer, data.val_dataloader(), most_batches, budget)
            result: dict[str, Any] = {"quality": validated.quality, "higher_is_better": validated.higher_is_better}
            values_N = validated.values_N
        else:
            result, tested = _tested(model, data, trainer, budget, most_batches)
            values_N = tested.values_N
            if tested.tasks:
                with replacing(run.folder(output) / TASKS, "wb") as file:
                    np.save(file, np.stack([own_N for _, own_N in tested.tasks.values()]))
            if tested.group_N is not None:
                with replacing(run.folder(output) / GROUPS, "wb") as file:
                    np.save(file, tested.group_N)
        with replacing(run.folder(output) / "values.npy", "wb") as file:
            np.save(file, values_N)
        return {"steps": pace.steps, "seconds_per_step": pace.seconds_per_step, **result}

    return run.record(output, work, budget.clock)


def _tested(
    model: Any, data: Any, trainer: Trainer, budget: Budget, most_batches: int | None
) -> tuple[dict[str, Any], Evaluated]:
    """Return the evaluations in a final run's result, and that of the test."""
    data.setup("test")
    tested = evaluate(model, trainer, data.test_dataloader(), most_batches, budget, "test")
    is_by_example = model.module is model and len(tested.values_N) > BLOCKS
    count = min(len(tested.values_N), _MOST_SAMPLE) if is_by_example else _MOST_SAMPLE
    sample = list(_sample(model, data.train_dataloader(), count, most_batches))
    trained = evaluate(model, trainer, sample, None, budget)
    result = {
        "name": tested.name,
        "higher_is_better": tested.higher_is_better,
        "quality": tested.quality,
        "train_quality": trained.quality,
        "routing": dict(tested.routing),
        "tasks": {task: metric for task, (metric, _) in tested.tasks.items()},
    }
    return result, tested


def _sample(model: Any, loader: Any, count: int, most_batches: int | None) -> Iterator[Any]:
    """Yield training batches until they have ``count`` examples, and no more than ``most_batches``."""
    taken = 0
    for number, batch in enumerate(loader):
        if taken >= count or (most_batches is not None and number >= most_batches):
            return
        taken += num_examples(model.example_inputs(batch))
        yield batch


def _fit(
    experiment: Experiment,
    system: str,
    rate: float | None,
    steps: int,
    budget: Budget,
    progress: Progress,
    until: Callable[[int, float], bool] = lambda steps, seconds: False,
    checked: int | None = 0,
) -> tuple[Any, Any, Trainer, Pace]:
    """Train a system; unless ``checked``, the batches of a validation (None: all), is 0, its best weights are kept."""
    model, data = experiment.build(system, rate)
    module = model.module
    module.reports = False  # pictures and checks are not part of a verdict
    best = None
    if checked != 0 and isinstance(model, SparseModule):
        best = Best(model, lambda: itertools.islice(data.val_dataloader(), checked), steps, budget)
    pace = Pace(budget, progress, until, best)
    trainer = experiment.trainer(pace, **TRAINS_ONLY, max_steps=steps)
    with interruptible(trainer):
        trainer.fit(module, datamodule=data)
    if pace.is_over and pace.steps < steps:
        raise BudgetOver
    if not pace.steps:
        raise ValueError(f"the training of {system} has no step (trainer options {experiment.trainer_options})")
    return model, data, trainer, pace


def measure_speed(
    experiment: Experiment, system: str, budget: Budget, seconds: float
) -> tuple[Speed, dict[str, Iterable[Any]]]:
    """Train ``system`` for a few steps and evaluate a few batches; return its speed and the data's loaders.

    Args:
        experiment: the configuration.
        system: the system to train.
        budget: the seconds that are left for it.
        seconds: the seconds of the whole verdict.

    Returns:
        The speed, whose ``validation`` and ``test`` are seconds of a *batch* there, and the loaders of "train", "val"
        and "test".

    Raises:
        BudgetOver: the time is up.
        ValueError: a split has no batch.
    """
    limit = min(_TRIAL_SHARE * seconds, _TRIAL_SECONDS)
    with quiet(own_notes=False):

        def until(steps: int, passed: float) -> bool:
            return steps >= _TRIAL_STEPS or (steps >= _LEAST_TRIAL_STEPS and passed >= limit)

        began = budget.clock()
        seed_everything(experiment.seed, verbose=False)
        model, data, trainer, pace = _fit(experiment, system, experiment.rate, 1_000_000, budget, unseen, until)
        start = budget.clock() - began - pace.steps * pace.seconds_per_step
        data.setup("test")
        loaders = {"train": data.train_dataloader(), "val": data.val_dataloader(), "test": data.test_dataloader()}
        check_validation(length_of(loaders["val"]), VALIDATION_NEED)
        of_batch = {}
        for stage in ("val", "test"):
            batches = int(min(length_of(loaders[stage]), 2))
            at = budget.clock()
            evaluate(model, trainer, loaders[stage], batches, budget, stage)
            of_batch[stage] = (budget.clock() - at) / batches
    return Speed(pace.seconds_per_step, max(start, 0.0), of_batch["val"], of_batch["test"]), loaders
