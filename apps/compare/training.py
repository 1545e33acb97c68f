"""A unit of work trains a model at one rate with one seed, validates it, and tests it where it is final.

A finished unit is one JSON file. An unfinished one resumes from its last checkpoint, as ``moesaic fit`` does.
"""

from __future__ import annotations

import contextlib
import math
import shutil
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.utilities.exceptions import SIGTERMException

from apps.base.files import read_json, write_json
from apps.base.machine import set_threads
from apps.base.progress import bar, say
from apps.base.quiet import quiet
from apps.compare.experiment import Experiment
from apps.compare.systems import System, label
from apps.equal_cost.comparison import Search
from apps.equal_cost.own_model import OwnModel
from apps.runner import unit as units
from apps.runner.workers import Progress, unseen
from apps.train.checkpoint.checkpoints import AtomicCheckpointIO, BestAndLast
from apps.train.checkpoint.resume import GeneratorState
from apps.train.checkpoint.stopping import on_signal
from apps.train.optim.averaging import AVERAGE, FOLDER
from apps.train.step.finite import NonFiniteError
from apps.train.step.module import SparseModule
from apps.train.threads import Threads
from apps.train.watch.logs import MetricsCSV
from apps.train.watch.progress import PassBar, routing_figures

CHECKPOINT = "last.ckpt"
TRIED = "tried.json"
"""Keeps the settings that an unfinished search has tried."""

EXAMPLES = "examples.json"


@dataclass(frozen=True)
class Unit(units.Unit):
    """One training of a comparison; the rate of an estimator is None.

    Attributes:
        share: part of the configured training, in (0, 1].
        final: True for a training that also reads the test split, once, with the last or averaged weights, and keeps
            these.
        minutes: time of the search of an estimator's settings, also in a final unit that takes its settings from it.
        tuned_by: seed of that search.
    """

    share: float = 1.0
    final: bool = False
    minutes: float | None = None
    tuned_by: int | None = None

    @property
    def name(self) -> str:
        minutes = "" if self.minutes is None else f"-{self.minutes:g}min"
        return self.named("final" if self.final else "search", minutes)

    @property
    def title(self) -> str:
        """Return the unit in words."""
        rate = "" if self.rate is None else f" at learning rate {self.rate:g}"
        return f"[{label(self.system)}] {f'seed {self.seed}' if self.final else 'search'}{rate}"

    @property
    def weight(self) -> float:
        return self.share

    @property
    def is_search(self) -> bool:
        return not self.final

    @property
    def search(self) -> Unit | None:
        """Return the search that a final unit of an estimator takes its settings from, if any."""
        return None if self.tuned_by is None else Unit(self.system, None, self.tuned_by, minutes=self.minutes)

    def checkpoint(self, output: Path) -> Path:
        """Return the file of the weights that a final unit was tested with, or of an unfinished unit's state."""
        average = self.folder(output) / AVERAGE
        return average if average.exists() else self.folder(output) / CHECKPOINT

    def examples(self, output: Path) -> list[dict[str, Any]]:
        """Return the test examples that a final unit has kept; mostly empty."""
        return read_json(self.folder(output) / EXAMPLES) or []


class Curve(Callback):
    """Records validation quality over seconds of training, which count only reading data and steps.

    It is saved in the checkpoint, so the time of a resumed run is the time of its kept steps. ``progress`` is called
    with the steps and the use of the experts.

    Attributes:
        points: (step, seconds, quality) of each validation.
    """

    def __init__(self, monitor: str, progress: Progress) -> None:
        self.monitor, self.progress, self._total = monitor, progress, 0
        self.points: list[tuple[int, float, float]] = []
        self._seconds, self._since = 0.0, None  # type: tuple[float, float | None]

    @property
    def seconds(self) -> float:
        return self._seconds + (0.0 if self._since is None else time.perf_counter() - self._since)

    def _pause(self) -> None:
        self._seconds, self._since = self.seconds, None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        total = trainer.estimated_stepping_batches
        self._total = int(total) if math.isfinite(total) else 0

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._since = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self.progress(trainer.global_step, self._total, routing_figures(trainer.callback_metrics))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._pause()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        value = trainer.callback_metrics.get(self.monitor)
        if value is None:
            raise ValueError(
                f"validation logs no {self.monitor!r}; it logs {', '.join(sorted(trainer.callback_metrics))}"
            )
        self.points.append((trainer.global_step, self.seconds, float(value)))
        if trainer.state.fn == "fit":
            self._since = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._pause()  # a checkpoint is written next

    def state_dict(self) -> dict[str, Any]:
        return {"points": [list(p) for p in self.points], "seconds": self.seconds}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.points = [(int(s), float(t), float(q)) for s, t, q in state_dict["points"]]
        self._seconds, self._since = float(state_dict["seconds"]), None


class Blocks(Callback):
    """Keeps the loss of each batch of a test, merged into at most ``MOST_BLOCKS`` blocks of examples.

    Attributes:
        batches: weight and loss of each batch.
    """

    def __init__(self) -> None:
        self.batches: list[tuple[float, float]] = []

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.batches = []

    def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any) -> None:
        if isinstance(outputs, Mapping) and {"loss", "weight"} <= outputs.keys():
            self.batches.append((float(outputs["weight"]), float(outputs["loss"])))

    def merged(self) -> list[tuple[float, float]]:
        """Return weight and mean loss of each block."""
        size = math.ceil(len(self.batches) / MOST_BLOCKS) or 1
        blocks = [self.batches[i : i + size] for i in range(0, len(self.batches), size)]
        sums = [(sum(w for w, _ in block), sum(w * loss for w, loss in block)) for block in blocks]
        return [(weight, total / weight) for weight, total in sums if weight]


MOST_BLOCKS = 50
"""Blocks of test examples whose losses a run of a ladder keeps."""


def shortened(options: dict[str, Any], share: float) -> dict[str, Any]:
    """Return trainer options for ``share`` of the training: at least one epoch, or one step where steps are counted."""
    changed = dict(options)
    for name in ("max_epochs", "max_steps"):
        value = options.get(name)
        if value is not None and value > 0:
            changed[name] = max(1, round(share * value))
    return changed


def train(
    experiment: Experiment,
    unit: Unit,
    output: Path,
    progress: Progress = unseen,
    callbacks: Sequence[Callback] = (),
) -> dict[str, Any]:
    """Do ``unit``, write its plain result into ``result.json`` of its folder, and return it.

    ``callbacks`` are further ones of the trainer, if the unit has one.

    Raises:
        NonFiniteError: a final run diverged; a search run records it.
        ValueError: the module does not log its monitored metric.
    """
    folder = unit.folder(output)

    def work() -> dict[str, Any]:
        module, data = experiment.build(unit.system, unit.rate, unit.seed if unit.final else experiment.seed)
        if isinstance(module, SparseModule | OwnModel):
            return _fit(experiment, module, data, unit, folder, progress, callbacks)
        data.prepare_data()
        data.setup("fit")
        if unit.final or unit.minutes is None:
            return _fit_estimator(experiment, module, data, unit, output)
        return _tune_estimator(module, data, unit, folder, progress)

    result = unit.record(output, work)
    shutil.rmtree(folder / FOLDER, ignore_errors=True)
    if not unit.final:
        for name in (CHECKPOINT, AVERAGE, TRIED):
            (folder / name).unlink(missing_ok=True)
    return result


def _fit(
    experiment: Experiment,
    model: Any,
    data: Any,
    unit: Unit,
    folder: Path,
    progress: Progress,
    further: Sequence[Callback],
) -> dict[str, Any]:
    module = model.module
    curve = Curve(model.monitor, progress)
    last = folder / CHECKPOINT
    module.starts_afresh = not last.exists()
    module.reports = False  # pictures and checks are not part of a comparison
    # Nothing logs this monitor: the last weights are compared, and a best checkpoint would only take time.
    checkpoints = BestAndLast(dirpath=str(folder), monitor="-", every_n_minutes=2.0)
    blocks = [Blocks()] if experiment.by_loss else []
    trainer = experiment.trainer(
        *(curve, GeneratorState(), checkpoints, PassBar(), *blocks, *further),
        **shortened(experiment.trainer_options, unit.share),
        plugins=[AtomicCheckpointIO()],
        logger=MetricsCSV(str(folder)) if unit.final else False,
        default_root_dir=str(folder),
        enable_checkpointing=True,
    )
    with interruptible(trainer):
        trainer.fit(module, datamodule=data, ckpt_path=str(last) if last.exists() else None, weights_only=True)
    steps = trainer.global_step
    if not steps or not last.exists():
        raise ValueError(f"{unit.name}: the training has no step (trainer options {experiment.trainer_options})")
    averages = model.average_last is not None
    # A run that is resumed after its last step has the averaged weights only in the checkpoint.
    tested = folder / AVERAGE if averages else last
    where: dict[str, Any] = {"datamodule": data, "ckpt_path": str(tested), "verbose": False, "weights_only": True}
    # The curve uses the weights in training: at equal time no system has averaged its own.
    points = list(curve.points)
    ended = bool(points) and points[-1][0] == steps
    if averages or not ended:
        with interruptible(trainer):
            trainer.validate(module, **where)  # the config's steps may end between two validations
    result: dict[str, Any] = {
        "quality": curve.points[-1][2],
        "steps": steps,
        "train_seconds": curve.seconds,
        "curve": [list(p) for p in (points if ended else curve.points)],
    }
    if unit.final:
        with interruptible(trainer):
            logged = trainer.test(module, **where)
        name = model.test_monitor
        values = {k: float(v) for part in logged for k, v in part.items()}
        # Values of a part, such as a layer's routing, have one more level in their names.
        result["test"] = {k: v for k, v in values.items() if k.count("/") <= 1 or k == name}
        if name not in result["test"]:
            raise ValueError(f"{type(module).__name__} monitors {model.monitor!r}, but a test logs no {name!r}")
        result["test_quality"] = result["test"][name]
        if not math.isfinite(result["test_quality"]):
            raise NonFiniteError(f"{name} is {result['test_quality']}, which compares with nothing")
        if blocks:
            result["blocks"] = blocks[0].merged()
        examples = model.comparison.examples_of_test()
        if examples:
            write_json(folder / EXAMPLES, examples)
        # These are means over the layers; the names of a layer's figures have one more level.
        of_routing = {k: v for k, v in values.items() if k.startswith("test/routing/") and k.count("/") == 2}
        result["routing"] = {k.rpartition("/")[2]: float(v) for k, v in of_routing.items()}
    return result


_UNSET = ("min_epochs", "min_steps", "max_time", "limit_test_batches", "limit_predict_batches", "val_check_interval")
TRAINS_ONLY = {**dict.fromkeys(_UNSET), "max_epochs": -1, "limit_val_batches": 0, "check_val_every_n_epoch": 1,
               "overfit_batches": 0.0}  # fmt: skip
"""Options of a trainer that trains for a number of steps and does nothing else."""


@contextlib.contextmanager
def same_threads(experiment: Experiment, systems: Sequence[System], output: Path, jobs: int = 1) -> Iterator[None]:
    """Compute inside with the user's number of threads, else with that of ``threads.json``: one for all systems.

    It is measured before the first run, unless several runs at a time share the cores: the larger one of those that the
    first two systems, sparse and a baseline, are fastest with.
    """
    path, former = output / "threads.json", torch.get_num_threads()
    kept = read_json(path) or 0
    if not kept and jobs == 1 and not any(output.glob(f"*/*/*/{units.RESULT}")):
        timed = [system.name for system in systems if system.cost and not system.refused][:2]
        with bar("measuring the number of threads"):
            kept = max(_fastest(experiment, name) for name in timed)
        if kept:
            write_json(path, kept)
            say(f"threads: {kept} of {former}, as measured")
    try:
        set_threads(experiment.threads or kept)
        yield
    finally:
        set_threads(former)


def _fastest(experiment: Experiment, system: str) -> int:
    """Return the number of threads with which a system trains fastest; 0 if it is not to be measured."""
    trainer = experiment.trainer(**TRAINS_ONLY, max_steps=1000)
    threads = Threads(trainer, experiment.threads, measures=not experiment.compiles, stops=True)
    if not threads.is_open:
        return 0
    with quiet(own_notes=False), threads.held(), interruptible(trainer), contextlib.suppress(NonFiniteError):
        seed_everything(experiment.seed, verbose=False)
        model, data = experiment.build(system, experiment.rate)
        model.module.reports = False
        trainer.fit(model.module, datamodule=data)
    return threads.number


def _fit_estimator(experiment: Experiment, model: Any, data: Any, unit: Unit, output: Path) -> dict[str, Any]:
    metric = experiment.monitor.partition("/")[2]
    settings: tuple[Any, ...] = ()
    if unit.search is not None:
        searched = unit.search.read(output)
        assert searched is not None, unit.search.name
        settings = (searched["settings"],)
    began = time.perf_counter()
    model.fit(data, unit.seed, *settings)
    seconds = time.perf_counter() - began
    quality = float(model.evaluate(data, "val")[metric])
    result: dict[str, Any] = {"quality": quality, "steps": None, "train_seconds": seconds}
    result["curve"] = [[0, seconds, quality]]
    if unit.final:
        data.setup("test")
        result["test"] = {f"test/{k}": float(v) for k, v in model.evaluate(data, "test").items()}
        result["test_quality"] = result["test"][f"test/{metric}"]
    return result


def _tune_estimator(model: Any, data: Any, unit: Unit, folder: Path, progress: Progress) -> dict[str, Any]:
    assert unit.minutes is not None
    path = folder / TRIED

    def keep(tried: dict[str, dict[str, float]]) -> None:
        write_json(path, tried)
        progress(len(tried), search.total, {})

    tried = read_json(path)
    if tried is None:  # a search of fewer minutes is the beginning of this one
        shorter = [read_json(p) for p in folder.parent.glob(f"search-*min-seed{unit.seed}/result.json")]
        shorter = [search["tried"] for search in shorter if search["minutes"] < unit.minutes]
        tried = max(shorter, key=len, default=None)
    search = Search(unit.minutes, tried, keep)
    settings = model.tune(data, unit.seed, search)
    return {
        "settings": settings,
        "tried": search.tried,
        "num_settings": search.total,
        "seconds": search.seconds,
        "minutes": unit.minutes,
    }


@contextlib.contextmanager
def interruptible(trainer: Trainer | None = None) -> Iterator[None]:
    """Make signals end ``trainer``, or without one all that is done inside, by an exception.

    Ctrl-C is a KeyboardInterrupt here: Lightning's trainer makes an exit of it and leaves the signal ignored. SIGTERM
    is a SIGTERMException: in a loop Lightning raises it at the end of a batch, but not after the last one.
    """

    def stop(*_: Any) -> None:
        if trainer is None or not trainer.received_sigterm:  # Lightning's handler, if it is set, was called first
            raise SIGTERMException

    with on_signal(signal.SIGTERM, stop), on_signal(signal.SIGINT, signal.default_int_handler):
        try:
            yield
        except SystemExit as stopped:
            if isinstance(stopped.__context__, KeyboardInterrupt):
                raise KeyboardInterrupt from None
            raise
    if trainer is not None and trainer.received_sigterm:
        raise SIGTERMException
