"""The runs of a suite in order: seed by seed, and with each seed all rows of all boards, so that a suite that is
stopped early has every board with fewer seeds."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sized
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from apps.base.machine import machine_line, source_commit
from apps.base.messages import message, some
from apps.base.quiet import quiet
from apps.cli.configs import shipped
from apps.cli.errors import UsageError
from apps.compare.display import Display
from apps.compare.experiment import Experiment, arguments, validation_batch
from apps.compare.measure import Job, measure
from apps.compare.options import Options
from apps.compare.plan import SEARCH_SEED, Plan
from apps.compare.suite.figures import Figures
from apps.compare.suite.file import Board, Entry, Suite
from apps.compare.suite.kinds import kind_of
from apps.compare.summary import short_name
from apps.compare.systems import SPARSE, candidates, measured
from apps.compare.training import Unit, train
from apps.data.cache import DataError
from apps.train.cost import Cost, measure_cost
from apps.train.finite import NonFiniteError
from apps.train.stopping import StopsSoon

_UNKNOWN_MINUTES = 1.0
"""What a run without an estimate counts for in the bar."""


class TimeIsUp(Exception):
    """The minutes of this call are over; what is at work is kept as a checkpoint."""


class _StopsInTime(StopsSoon):
    """Ends a training after an optimizer step with a checkpoint, or after a validation that is at work, in time."""

    def __init__(self, is_over: Callable[[], bool]) -> None:
        super().__init__()
        self.is_over = is_over

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self.asked = self.asked or self.is_over()


class Queue:
    """Does the runs of a suite that are not finished.

    Args:
        suite: the suite.
        figures: figures of the finished runs.
        rounds: timed rounds of speed and memory of each row; 0 measures nothing.
        display: shows what is at work.
        minutes: time for this call; None: no limit.
        clock: a function that returns the time in seconds.

    Attributes:
        missing: why the data of a board cannot be had, by the name of the board.
        is_over: whether the time was up before all was done.
    """

    def __init__(
        self,
        suite: Suite,
        figures: Figures,
        rounds: int,
        display: Display,
        minutes: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.suite, self.figures, self.rounds, self.display = suite, figures, rounds, display
        self.chosen = [board for board in suite.boards if suite.is_chosen(board)]
        self._clock, self._end = clock, None if minutes is None else clock() + 60 * minutes
        self._experiment = functools.lru_cache(maxsize=2)(experiment_of)
        self._claimed: set[Path] = set()
        self.missing: dict[str, str] = {}
        self.is_over = False

    def left(self) -> list[tuple[Board, Entry, int]]:
        """Return the runs that are not finished, in their order."""
        return [
            (board, entry, self.suite.seeds_of(entry)[number])
            for number in range(self.suite.seeds)
            for board in self.chosen
            for entry in board.entries
            if not self._is_done(entry, self.suite.seeds_of(entry)[number])
        ]

    def do(self) -> None:
        """Do all runs that the time allows.

        Raises:
            ValueError: a configuration or data that are refused, rows of a board with other numbers of test examples,
                or a metric that a board names and no test logs.
        """
        try:
            for board in self.chosen:  # what is refused is refused now, and not after hours
                for entry in board.entries:
                    self._describe(board, entry)
            left = self.left()
            self.display.start(sum(_minutes(entry) for _, entry, _ in left))
            for board, entry, seed in left:
                self._check_time()
                if board.name not in self.missing:
                    self._do(board, entry, seed)
        except TimeIsUp:
            self.is_over = True

    def _is_done(self, entry: Entry, seed: int) -> bool:
        row = self.figures.row(entry)
        if row.get("refused"):
            return True
        return seed in row["runs"] and not self._lacks_speed(entry, row, seed)

    def _lacks_speed(self, entry: Entry, row: Mapping[str, Any], seed: int) -> bool:
        """Return whether the speed is still to be measured: once a row, after the training of its first seed."""
        if not self.rounds or row.get("cost") is None or "speed" in row or seed != self.suite.seeds_of(entry)[0]:
            return False
        return "diverged" not in row["runs"][seed]

    def _describe(self, board: Board, entry: Entry) -> None:
        """Save what a row is and costs, where it is not known; what was left out may be there by now."""
        row = self.figures.row(entry)
        if ("kind" in row and not row.get("refused")) or board.name in self.missing:
            return
        self._check_time()
        changes = self.figures.changes(entry)
        if changes:
            self.display.say(
                f"{_title(entry)}: its configuration is another one ({some(changes, 3)}): it is trained anew"
            )
        with self._with_data(board):
            try:
                with quiet(own_notes=False), self.display.step(f"{_title(entry)}: counting FLOPs"):
                    facts = _facts(self._experiment(entry.files, entry.rest), entry)
            except (DataError, UsageError):
                raise
            except ValueError as error:
                raise ValueError(f"{_title(entry)}: {message(error)}") from error
            self._check_examples(board, entry, facts["test_examples"])
            self.figures.add(entry, **facts)
            if facts["refused"]:
                self.display.say(f"{_title(entry)} is left out: {facts['refused']}")

    @contextlib.contextmanager
    def _with_data(self, board: Board) -> Iterator[None]:
        """Leave out the board, and say so, where its data cannot be had inside."""
        try:
            yield
        except DataError as error:
            self.missing[board.name] = str(error)
            self.display.say(f"{board.name} is not run: {error}")

    def _check_examples(self, board: Board, entry: Entry, number: int | None) -> None:
        for other in board.entries:
            known = self.figures.row(other).get("test_examples")
            if None not in (number, known) and number != known:
                raise ValueError(
                    f"board {board.name!r}: {entry.name!r} has {number:,} test examples, and {other.name!r} has "
                    f"{known:,}: the rows of a board share data, split and test examples"
                )

    def _do(self, board: Board, entry: Entry, seed: int) -> None:
        """Do a run, and after that of the first seed measure the speed."""
        with self._with_data(board):
            with quiet(own_notes=False):
                experiment = self._experiment(entry.files, entry.rest)
            if seed not in self.figures.row(entry)["runs"]:
                self._run(board, entry, seed, experiment)
            if self._lacks_speed(entry, self.figures.row(entry), seed):
                self._check_time()
                self.figures.add(entry, speed=self._speed(entry, seed, experiment))
        gc.collect()

    def _run(self, board: Board, entry: Entry, seed: int, experiment: Experiment) -> None:
        folder, row = entry.folder(self.suite.runs_folder), self.figures.row(entry)
        self._claim(entry, experiment, folder)
        name = f"{_title(entry)}, seed {seed}"
        unit = self._unit(entry, row, seed)
        if unit.search is not None and unit.search.read(folder) is None:
            self._train(experiment, unit.search, folder, f"{name}, its settings", 0.0)
        try:
            result = unit.read(folder) or self._train(experiment, unit, folder, name, _minutes(entry))
        except NonFiniteError as error:
            self.figures.add_run(entry, seed, {"diverged": str(error), **_where()})
            self.display.say(f"{name}: diverged ({error})")
            return
        test = {short_name(metric): value for metric, value in result["test"].items()}
        lacking = [metric for metric in board.metrics if metric not in test]
        if lacking and entry.baseline is None:
            logged = ", ".join(sorted(test))
            raise ValueError(f"board {board.name!r}: {entry.name!r} tests no {lacking[0]!r}; it has {logged}")
        run = {name: result[name] for name in ("steps", "train_seconds")}
        self.figures.add_run(entry, seed, {"test": test, **run, **_where()})
        self.display.finished(name, _minutes(entry))
        shown = ", ".join(f"{m} {test[m]:.4g}" for m in board.metrics or [row["monitor"]] if m in test)
        self.display.say(f"{name}: test {shown}, {result['train_seconds']:.1f} s")

    def _claim(self, entry: Entry, experiment: Experiment, folder: Path) -> None:
        """Refuse a folder of runs that an earlier version of the code has begun with other defaults."""
        if folder in self._claimed:
            return
        rates = () if experiment.rate is None else (experiment.rate,)
        options = Options(num_seeds=self.suite.seeds, learning_rates=rates, baseline_minutes=entry.baseline_minutes)
        Plan.make(experiment.plain(), options, experiment.rate, experiment.seed).claim(folder)
        self._claimed.add(folder)

    def _train(self, experiment: Experiment, unit: Unit, folder: Path, name: str, work: float) -> dict[str, Any]:
        """Do a unit of work.

        Raises:
            TimeIsUp: the time is up; the unit goes on from its checkpoint, and a search after the last setting.
        """
        stops = _StopsInTime(self._time_is_up)

        def progress(done: int, total: int, figures: Mapping[str, float]) -> None:
            self.display.unit(name, done, total, figures, work)
            if unit.minutes is not None and not unit.final:
                self._check_time()

        try:
            return train(experiment, unit, folder, progress, (stops,))
        except SIGTERMException:
            if stops.asked:
                raise TimeIsUp from None
            raise

    def _unit(self, entry: Entry, row: Mapping[str, Any], seed: int) -> Unit:
        system = entry.baseline or SPARSE
        if not row.get("tunes"):
            return Unit(system, row.get("rate"), seed, final=True)
        return Unit(system, None, seed, final=True, minutes=entry.baseline_minutes, tuned_by=entry.seed + SEARCH_SEED)

    def _speed(self, entry: Entry, seed: int, experiment: Experiment) -> dict[str, Any]:
        unit, name = self._unit(entry, self.figures.row(entry), seed), f"{_title(entry)}, speed and memory"
        trained = unit.checkpoint(entry.folder(self.suite.runs_folder))
        # The runs of figures that were made elsewhere may be gone: speed needs the model, and trained weights little.
        checkpoint = str(trained) if trained.exists() else None
        job = Job(experiment.arguments, unit.system, checkpoint, experiment.replaced, torch.get_num_threads())
        show = functools.partial(self.display.unit, name, work=0.0)
        speed = measure({name: job}, self.rounds, show, experiment.modules)[name]
        self.display.finished(name, 0.0)
        return {
            "train_examples_per_second": speed["train_examples_per_second"],
            "inference_examples_per_second": speed["inference_examples_per_second"],
            "peak_memory_bytes": speed["peak_memory_bytes"] - speed["base_memory_bytes"],
            "trained": checkpoint is not None,
            **_where(),
        }

    def _time_is_up(self) -> bool:
        return self._end is not None and self._clock() >= self._end

    def _check_time(self) -> None:
        if self._time_is_up():
            raise TimeIsUp


def experiment_of(files: tuple[str, ...], rest: tuple[str, ...]) -> Experiment:
    """Return the experiment of a row's files and values."""
    config, *overlays = (str(shipped(Path(file))) for file in files)
    return Experiment(arguments(config, overlays, rest))


def _facts(experiment: Experiment, entry: Entry) -> dict[str, Any]:
    """Return what a row is and costs.

    Returns:
        ``kind``, as ``kind_of`` names it; ``cost``, None of an estimator; ``rate``, its learning rate; ``tunes``, True
        where it searches its settings; ``refused``, why it is not trained, or ""; ``test_examples``, None where the
        data do not tell; ``monitor``, the name of its test quality; ``higher_is_better``.

    Raises:
        ValueError: the baseline is unknown, or the data have no validation split.
    """
    torch.manual_seed(experiment.seed)
    model, data = experiment.build(SPARSE)
    batch, replaced = validation_batch(data, "every training is followed on"), list(model.moe_block_names)
    data.setup("test")
    examples = getattr(data.test_dataloader(), "dataset", None)
    cost: Cost | None = measure_cost(model, batch, replaced)
    refused = ""
    if entry.baseline is not None:
        baseline = candidates(model, (), [entry.baseline])[entry.baseline]
        assert cost is not None
        system = measured(entry.baseline, baseline, batch, cost, replaced, model.module.device)
        cost, refused = system.cost, system.refused
        model = None if baseline.build is None else baseline.build()
    return {
        "kind": "" if model is None else kind_of(model),
        "cost": None if cost is None else dataclasses.asdict(cost),
        "rate": None if cost is None else experiment.rate,
        "tunes": bool(getattr(model, "tunes", False)),
        "refused": refused,
        "test_examples": len(examples) if isinstance(examples, Sized) else None,
        "monitor": short_name(experiment.test_monitor),
        "higher_is_better": experiment.monitor_mode == "max",
    }


def _where() -> dict[str, str]:
    """Return on what a figure was made: the machine and the day, and the commit of the source."""
    return {"machine": machine_line(), "commit": source_commit()}


def _minutes(entry: Entry) -> float:
    return entry.minutes or _UNKNOWN_MINUTES


def _title(entry: Entry) -> str:
    return f"{entry.board}: {entry.name}"
