"""One run of a verdict: a system trained for some steps at one rate with one seed, and evaluated.

A finished run is one JSON file, beside which it keeps its values by example: of the validation in a search, else of the
test. An unfinished one is done anew: runs are short.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything

from apps.base.files import replacing
from apps.base.quiet import quiet
from apps.compare.experiment import Experiment, check_validation
from apps.compare.training import interruptible
from apps.runner.budget import Budget, BudgetOver
from apps.runner.unit import Unit
from apps.runner.workers import Progress, unseen
from apps.train.cost.flops import num_examples
from apps.train.watch.progress import routing_figures
from apps.verdict.evaluation import BLOCKS, evaluate
from apps.verdict.schedule import Speed

# Trainer options that a verdict sets itself, beside those that every comparison sets.
_UNSET = ("min_epochs", "min_steps", "max_time", "limit_test_batches", "limit_predict_batches", "val_check_interval")
_OWN = {**dict.fromkeys(_UNSET), "max_epochs": -1, "limit_val_batches": 0, "check_val_every_n_epoch": 1,
        "overfit_batches": 0.0}  # fmt: skip

VALIDATION_NEED = "the learning rates are chosen by"
"""What a verdict needs a validation split for, as messages say it."""

_TRIAL_STEPS, _LEAST_TRIAL_STEPS, _TRIAL_SHARE, _TRIAL_SECONDS = 25, 3, 0.01, 3.0
_MOST_SAMPLE = 2000


@dataclass(frozen=True)
class Run(Unit):
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

    def values(self, output: Path) -> np.ndarray:
        """Return the values by example that a finished run has kept; none of one that diverged.

        Raises:
            ValueError: they are not there, or damaged.
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


class Pace(Callback):
    """Measures the seconds of a training, and gives it up when the budget is over.

    Args:
        budget: is asked after each step.
        progress: is called with the steps and the use of the experts.
        until: ends a trial: a function of the steps done and the seconds since the first one.

    Attributes:
        steps: optimizer steps done.
    """

    def __init__(
        self, budget: Budget, progress: Progress, until: Callable[[int, float], bool] = lambda steps, seconds: False
    ) -> None:
        self.budget, self.progress, self.until = budget, progress, until
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
        if self.is_over or (self._first_steps and self.until(self.steps, self._last - self._first)):
            trainer.should_stop = True

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if torch.cuda.is_available():  # steps of a GPU are asked for before they are done
            torch.cuda.synchronize()
            self._last = self.budget.clock()


def do(
    experiment: Experiment,
    run: Run,
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
        most_batches: batches of an evaluation at most; None: all.
        progress: is called with the steps done and to do, and the use of the experts.

    Raises:
        BudgetOver: the time was up before the run was finished; nothing of it is kept.
        NonFiniteError: a final run diverged; a run of the search records it.
    """

    def work() -> dict[str, Any]:
        model, data, trainer, pace = _fit(experiment, run.system, run.rate, run.steps, budget, progress)
        if run.is_search:
            validated = evaluate(model, trainer, data.val_dataloader(), most_batches, budget)
            result: dict[str, Any] = {"quality": validated.quality, "higher_is_better": validated.higher_is_better}
            values_N = validated.values_N
        else:
            result, values_N = _tested(model, data, trainer, budget, most_batches)
        with replacing(run.folder(output) / "values.npy", "wb") as file:
            np.save(file, values_N)
        return {"steps": pace.steps, "seconds_per_step": pace.seconds_per_step, **result}

    return run.record(output, work, budget.clock)


def _tested(
    model: Any, data: Any, trainer: Trainer, budget: Budget, most_batches: int | None
) -> tuple[dict[str, Any], np.ndarray]:
    """Return what a final run's result has of its evaluations, and the test values (N,)."""
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
    }
    return result, tested.values_N


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
) -> tuple[Any, Any, Trainer, Pace]:
    model, data = experiment.build(system, rate)
    module = model.module
    module.reports = False  # pictures and checks are not part of a verdict
    pace = Pace(budget, progress, until)
    trainer = experiment.trainer(pace, **_OWN, max_steps=steps)
    with interruptible(trainer):
        trainer.fit(module, datamodule=data)
    if pace.is_over and pace.steps < steps:
        raise BudgetOver
    if not pace.steps:
        raise ValueError(f"the training of {system} has no step (trainer options {experiment.trainer_options})")
    return model, data, trainer, pace


def measure_speed(
    experiment: Experiment, system: str, budget: Budget, seconds: float
) -> tuple[Speed, dict[str, float]]:
    """Train ``system`` for a few steps and evaluate a few batches; return its speed and what else that tells.

    Args:
        experiment: the configuration.
        system: what is trained.
        budget: the seconds that are left for it.
        seconds: those of the whole verdict.

    Returns:
        The speed, whose ``validation`` and ``test`` are seconds of a *batch* there, and the numbers of batches:
        ``train_batches`` of an epoch, infinite where it has no length, ``val_batches`` and ``test_batches``.

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
        counts = {f"{name}_batches": _length(loader) for name, loader in loaders.items()}
        check_validation(counts["val_batches"], VALIDATION_NEED)
        of_batch = {}
        for stage in ("val", "test"):
            batches = min(2, int(min(counts[f"{stage}_batches"], 2)))
            at = budget.clock()
            evaluate(model, trainer, loaders[stage], batches, budget, stage)
            of_batch[stage] = (budget.clock() - at) / batches
    return Speed(pace.seconds_per_step, max(start, 0.0), of_batch["val"], of_batch["test"]), counts


def _length(loader: Any) -> float:
    try:
        return float(len(loader))
    except TypeError:  # a stream
        return math.inf
