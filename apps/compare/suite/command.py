"""The command ``moesaic compare --suite FILE``: it does the runs and writes the leaderboard."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from apps.base.files import write_text
from apps.base.machine import machine_line, moment, source_commit
from apps.base.messages import message, some
from apps.base.progress import Bar, bar, say
from apps.base.quiet import quiet
from apps.cli.configs import shipped
from apps.cli.errors import UsageError
from apps.compare.command import command_line, until_stopped
from apps.compare.experiment import Experiment, arguments, validation_batch
from apps.compare.measure import Job, measure
from apps.compare.options import CompareOptions
from apps.compare.suite.file import Board, Command, Entry, Suite
from apps.compare.suite.standings import Figures, duration, leaderboard_page, standings
from apps.compare.summary import short_name
from apps.compare.systems import SPARSE, candidates, measured
from apps.compare.training import Unit, interruptible, train
from apps.compare.work import Plan
from apps.data.cache import DataError
from apps.report.page import FILE, open_page, show_page, write_page
from apps.report.page.writing import markdown, write_index
from apps.runner.runner import Budget, BudgetOver, Runner, at_work
from apps.runner.workers import Progress
from apps.train.checkpoint.stopping import StopsSoon
from apps.train.cost.flops import Cost, measure_cost
from apps.train.cost.kinds import kind_of_network
from apps.train.step.finite import NonFiniteError

_UNKNOWN_MINUTES = 1.0
"""What a run without an estimate counts for in the bar."""


class _StopsInTime(StopsSoon):
    """Ends a training after an optimizer step with a checkpoint, or after a validation that is at work, in time."""

    def __init__(self, budget: Budget) -> None:
        super().__init__()
        self.budget = budget

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self.asked = self.asked or self.budget.left <= 0


@dataclass(frozen=True, eq=False)
class SuiteRun:
    """A row of a board with one seed, the ``number``-th of its own."""

    board: Board
    entry: Entry
    number: int
    seed: int

    @property
    def title(self) -> str:
        return f"{self.entry.title}, seed {self.seed}"

    @property
    def weight(self) -> float:
        return self.entry.minutes or _UNKNOWN_MINUTES


class Queue(Runner[SuiteRun, Mapping[str, Any]]):
    """Does the runs of a suite that are not finished.

    Args:
        suite: the suite.
        figures: figures of the finished runs.
        rounds: timed rounds of speed and memory of each row; 0 measures nothing.
        whole: the bar over all runs.
        budget: the time for this call.

    Attributes:
        missing: why the data of a board is not available, by the name of the board.
        is_over: whether the time was up before all was done.
    """

    def __init__(self, suite: Suite, figures: Figures, rounds: int, whole: Bar, budget: Budget) -> None:
        super().__init__(whole, suite.runs_folder, budget)
        self.suite, self.figures, self.rounds = suite, figures, rounds
        self.chosen = [board for board in suite.boards if suite.chosen is None or board.name in suite.chosen]
        self._experiment = functools.lru_cache(maxsize=2)(experiment_of)
        self.missing: dict[str, str] = {}
        self.is_over = False

    def left(self) -> list[SuiteRun]:
        """Return the runs that are not finished, in their order."""
        every = (
            SuiteRun(board, entry, number, self.suite.seeds_of(entry)[number])
            for number in range(self.suite.seeds)
            for board in self.chosen
            for entry in board.entries
        )
        return [run for run in every if self.read(run) is None]

    def do(self) -> None:
        """Do all runs that the time allows.

        Raises:
            ValueError: a configuration or data that are rejected, rows of a board with other numbers of test examples,
                or a metric that a board names and no test logs.
        """
        try:
            for board in self.chosen:  # rejects now, not after hours
                for entry in board.entries:
                    self._describe(board, entry)
            left = self.left()
            self.whole.begin(sum(map(self.weight, left)))
            self.finish(left)
        except BudgetOver:
            self.is_over = True

    def read(self, unit: SuiteRun) -> Mapping[str, Any] | None:
        row = self.figures.row(unit.entry)
        if row.get("refused"):
            return row
        return None if self._lacks_speed(unit, row) else row["runs"].get(unit.seed)

    def _lacks_speed(self, run: SuiteRun, row: Mapping[str, Any]) -> bool:
        """Return whether the speed is still to be measured: once a row, after the training of its first seed."""
        if not self.rounds or row.get("cost") is None or "speed" in row or run.number:
            return False
        return "diverged" not in row["runs"].get(run.seed, {})

    def _describe(self, board: Board, entry: Entry) -> None:
        """Save the description and cost of a row, if it is unknown; a row that was left out may be there by now."""
        row = self.figures.row(entry)
        if ("kind" in row and not row.get("refused")) or board.name in self.missing:
            return
        self.budget.check()
        changes = self.figures.changes(entry)
        if changes:
            say(f"{entry.title}: its configuration has changed ({some(changes, 3)}): it is trained again")
        with self._with_data(board):
            try:
                with quiet(own_notes=False), bar(f"{entry.title}: counting FLOPs"):
                    facts = _facts(self._experiment(entry.files, entry.rest), entry)
            except (DataError, UsageError):
                raise
            except ValueError as error:
                raise ValueError(f"{entry.title}: {message(error)}") from error
            self._check_examples(board, entry, facts["test_examples"])
            self.figures.add(entry, **facts)
            if facts["refused"]:
                say(f"{entry.title} is left out: {facts['refused']}")

    @contextlib.contextmanager
    def _with_data(self, board: Board) -> Iterator[None]:
        """Leave out the board, and say so, if its data is not available inside."""
        try:
            yield
        except DataError as error:
            self.missing[board.name] = str(error)
            say(f"{board.name} is not run: {error}")

    def _check_examples(self, board: Board, entry: Entry, number: int | None) -> None:
        for other in board.entries:
            known = self.figures.row(other).get("test_examples")
            if None not in (number, known) and number != known:
                raise ValueError(
                    f"board {board.name!r}: {entry.name!r} has {number:,} test examples, and {other.name!r} has "
                    f"{known:,}: the rows of a board share data, split and test examples"
                )

    def line(self, unit: SuiteRun, result: Mapping[str, Any]) -> str:
        if "diverged" in result:
            return f"diverged ({result['diverged']})"
        metrics = unit.board.metrics or [self.figures.row(unit.entry)["monitor"]]
        shown = ", ".join(f"{m} {result['test'][m]:.4g}" for m in metrics if m in result["test"])
        return f"test {shown}, {result['train_seconds']:.1f} s"

    def work(self, unit: SuiteRun, progress: Progress) -> Mapping[str, Any] | None:
        """Do a run, and after the first seed's run measure the speed; None if its data is not available."""
        entry = unit.entry
        with self._with_data(unit.board):
            if unit.board.name in self.missing:
                return None
            with quiet(own_notes=False):
                experiment = self._experiment(entry.files, entry.rest)
            if unit.seed not in self.figures.row(entry)["runs"]:
                self.figures.add_run(entry, unit.seed, {**self._run(unit, experiment, progress), **_where()})
            if self._lacks_speed(unit, self.figures.row(entry)):
                self.budget.check()
                self.figures.add(entry, speed=self._speed(unit, experiment))
            return self.read(unit)
        return None

    def _run(self, run: SuiteRun, experiment: Experiment, progress: Progress) -> dict[str, Any]:
        """Return the figures of a run, which is done where its folder does not have them."""
        board, entry = run.board, run.entry
        folder = entry.folder(self.suite.runs_folder)
        plan, unit = self._planned(run, experiment)
        plan.claim(folder)  # rejects one that an earlier version of the code has begun with other defaults
        if unit.search is not None and unit.search.read(folder) is None:
            show = functools.partial(self.show, f"{run.title}, its settings", weight=0.0)
            self._train(experiment, unit.search, folder, show)
        try:
            result = unit.read(folder) or self._train(experiment, unit, folder, progress)
        except NonFiniteError as error:
            return {"diverged": str(error)}
        test = {short_name(metric): value for metric, value in result["test"].items()}
        lacking = [metric for metric in board.metrics if metric not in test]
        if lacking and entry.baseline is None:
            logged = ", ".join(sorted(test))
            raise ValueError(f"board {board.name!r}: {entry.name!r} tests no {lacking[0]!r}; it has {logged}")
        return {"test": test, "steps": result["steps"], "train_seconds": result["train_seconds"]}

    def _planned(self, run: SuiteRun, experiment: Experiment) -> tuple[Plan, Unit]:
        """Return the plan of the comparison that has the row's runs, and the systems trained in this one."""
        entry, row = run.entry, self.figures.row(run.entry)
        rates = () if experiment.rate is None else (experiment.rate,)
        options = CompareOptions(
            num_seeds=self.suite.seeds, learning_rates=rates, baseline_minutes=entry.baseline_minutes
        )
        plan = Plan.make(experiment.plain(), options, experiment.rate, experiment.seed)
        units = plan.final_units(entry.baseline or SPARSE, row.get("rate"), bool(row.get("tunes")))
        return plan, units[run.number]

    def _train(self, experiment: Experiment, unit: Unit, folder: Path, show: Progress) -> dict[str, Any]:
        """Do a unit of work.

        Raises:
            BudgetOver: the time is up; the unit resumes from its checkpoint, and a search after the last setting.
        """
        stops = _StopsInTime(self.budget)

        def progress(done: int, total: int, figures: Mapping[str, float]) -> None:
            show(done, total, figures)
            if unit.minutes is not None and unit.is_search:
                self.budget.check()

        try:
            return train(experiment, unit, folder, progress, (stops,))
        except SIGTERMException:
            if stops.asked:
                raise BudgetOver from None
            raise

    def _speed(self, run: SuiteRun, experiment: Experiment) -> dict[str, Any]:
        (_, unit), name = self._planned(run, experiment), f"{run.entry.title}, speed and memory"
        trained = unit.checkpoint(run.entry.folder(self.suite.runs_folder))
        # The runs of figures that were made elsewhere may be gone: speed needs the model, and trained weights little.
        checkpoint = str(trained) if trained.exists() else None
        job = Job(experiment.arguments, unit.system, checkpoint, torch.get_num_threads())
        show = functools.partial(self.show, name, weight=0.0)
        speed = measure({name: job}, self.rounds, show, experiment.modules)[name]
        self.end(name, 0.0)
        return {
            **{name: speed[name] for name in ("train_examples_per_second", "inference_examples_per_second")},
            "peak_memory_bytes": speed["peak_memory_bytes"] - speed["base_memory_bytes"],
            "trained": checkpoint is not None,
            **_where(),
        }


def experiment_of(files: tuple[str, ...], rest: tuple[str, ...]) -> Experiment:
    """Return the experiment of a row's files and values."""
    config, *overlays = (str(shipped(Path(file))) for file in files)
    return Experiment(arguments(config, overlays, rest))


def _facts(experiment: Experiment, entry: Entry) -> dict[str, Any]:
    """Return the description and cost of a row.

    Returns:
        ``kind``, as ``kind_of`` names it; ``cost``, None of an estimator; ``rate``, its learning rate; ``tunes``, True
        where it searches its settings; ``refused``, why it is not trained, or ""; ``test_examples``, None if the data
        do not tell; ``monitor``, the name of its test quality; ``higher_is_better``.

    Raises:
        ValueError: the baseline is unknown, or the data have no validation split.
    """
    torch.manual_seed(experiment.seed)
    model, data = experiment.build(SPARSE)
    batch, replaced = validation_batch(data, "every training is followed on"), list(model.comparison.moe_block_names)
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


def kind_of(model: Any) -> str:
    """Return the kind of a model, such as "sparse".

    Args:
        model: a module with its ``module``, the torch model, or an ``Estimator``, whose attribute ``kind`` says it.
    """
    module = getattr(model, "module", None)
    return str(getattr(model, "kind", "no network")) if module is None else kind_of_network(module)


def _where() -> dict[str, str]:
    """Return the conditions of a figure: the machine and the day, and the commit of the source."""
    return {"machine": machine_line(), "commit": source_commit()}


def run(command: Command, argv: Sequence[str]) -> int:
    """Run ``moesaic compare ARGV``, and return 0, 130 where the user stopped it, or 143 where the system did.

    Raises:
        ValueError: a rejected configuration or row, or a folder with another comparison.
    """
    # The same command continues, but for --minutes 0, which trains nothing.
    again = command_line(["--suite", command.suite.path] if command.minutes == 0 else argv)
    return until_stopped(lambda: run_suite(command, again), again)


@interruptible()
def run_suite(command: Command, again: str, clock: Callable[[], float] = time.monotonic) -> Queue:
    """Do the runs of a suite that are left, as many as the time allows, and write and show the leaderboard.

    The leaderboard is written as well where a run fails or is stopped, with the finished rows. ``again`` is the command
    to continue, as shown to the user.
    """
    suite = command.suite
    figures, runs = Figures(suite.figures_folder), suite.runs_folder
    budget = Budget(math.inf if command.minutes is None else 60 * command.minutes, clock=clock)
    with at_work(runs, "suite", suite.title) as whole:
        queue = Queue(suite, figures, command.rounds, whole, budget)
        try:
            queue.do()
        finally:
            _write(suite, figures)
        left = queue.left()
        if left:
            estimate = sum(run.entry.minutes or 0.0 for run in left)
            about = f", about {duration(estimate)} by the suite's estimates" if estimate else ""
            why = "the time is up" if queue.is_over else "the data of some boards cannot be had"
            say(f"{why}; runs left: {len(left)}{about}. To continue: {again}")
    if command.open:
        open_page(runs / FILE)
    return queue


def _write(suite: Suite, figures: Figures) -> None:
    """Write the leaderboard as Markdown and as a page, and show who leads."""
    boards = [standings(board, suite, figures) for board in suite.boards]
    page = leaderboard_page(suite, boards, moment())
    text = write_text(suite.leaderboard_file, markdown(leaderboard_page(suite, boards, "", brief=True)))
    show_page(page)
    say(f"leaderboard: {text}")
    write_page(page, suite.runs_folder / FILE)
    write_index(suite.runs_folder.parent)
