"""The command line of ``moesaic compare``, and the order of its work."""

from __future__ import annotations

import contextlib
import datetime
import functools
import gc
import platform
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from apps.base.machine import cpu_name
from apps.base.quiet import quiet
from apps.cli import is_termination
from apps.cli.request import shipped
from apps.compare import table
from apps.compare.experiment import Experiment, arguments
from apps.compare.files import locked, read_json, write_json, write_text
from apps.compare.measure import Job, measure
from apps.compare.options import Command, Options
from apps.compare.parallel import train_all
from apps.compare.plan import Plan, at_edge
from apps.compare.stats import choose
from apps.compare.summary import ExamplePair, Summary, summarize, tuned
from apps.compare.systems import SPARSE, System, find_systems, label
from apps.compare.training import Unit, train
from apps.equal_cost import routers
from apps.train.module import SparseModule
from apps.train.stopping import terminable

if TYPE_CHECKING:
    from rich.progress import TaskID


def run(argv: Sequence[str]) -> int:
    """Run ``moesaic compare ARGV``.

    Returns:
        0, 130 where the user stopped it, or 143 where the system did.

    Raises:
        UsageError: a wrong option.
        ValueError: a wrong value, a refused comparison, or a folder with another one.
    """
    try:
        run_command(argv)
    except KeyboardInterrupt:
        return _stopped("stopped", 130, argv)
    except SystemExit as stop:
        if not is_termination(stop):
            raise
        return _stopped("terminated", 143, argv)
    return 0


def _stopped(how: str, code: int, argv: Sequence[str]) -> int:
    print(f"\n{how}; what is finished is kept. To go on: {command_line(argv)}", file=sys.stderr)
    return code


@terminable()
def run_command(argv: Sequence[str], title: str | None = None) -> Outcome:
    """Do what ``run`` does and return what came out of it; ``title`` is that of the table."""
    asked = Command.read(argv)
    config, *overlays = (str(shipped(path)) for path in asked.files)  # each process reads them
    names = asked.options.routers
    return compare(
        arguments(config, overlays, asked.rest, names),
        asked.options,
        asked.output,
        command=command_line(argv),
        title=title or f"{'Routers' if names else 'Sparse and dense'}: {asked.name}",
        jobs=asked.jobs,
    )


def command_line(argv: Sequence[str]) -> str:
    """What to type for ``argv``, with paths from here."""
    here = f"{Path.cwd()}/"
    return shlex.join(["moesaic", "compare", *(a.removeprefix(here) for a in argv)])


@dataclass(frozen=True)
class Outcome:
    """A finished comparison.

    Attributes:
        summary: its numbers.
        output: its folder.
        arguments: of ``Experiment``.
        files: what was written for people: the table, the JSON file, the picture.
        checkpoints: by system, the trained weights of the first seed; without estimators.
    """

    summary: Summary
    output: Path
    arguments: tuple[str, ...]
    files: tuple[Path, ...]
    checkpoints: Mapping[str, Path]

    def pictures(self) -> list[Path]:
        return [p for p in self.files if p.suffix == ".png"]


def compare(
    read: Sequence[str],
    options: Options,
    output: Path,
    command: str = "",
    title: str = "Sparse and dense",
    jobs: int = 1,
) -> Outcome:
    """Do a comparison, or what is left of it, and show the table.

    Args:
        read: arguments of ``Experiment``.
        options: of the comparison.
        output: its folder; what is finished there is not done again, also where seeds, baselines or routers are added.
        command: how to repeat it; written into the JSON file.
        title: of the table and the picture.
        jobs: runs at a time; above 1 each in a process of its own, with a part of the threads.

    Raises:
        UsageError, ValueError: see ``run``.
        NonFiniteError: a final run diverged.
    """
    with quiet(own_notes=False):
        experiment = Experiment(read)
    plan = Plan.make(experiment.plain(), options, experiment.rate, experiment.seed)
    with locked(output):
        plan.claim(output)
        display = Display()
        with display:
            systems = _systems(experiment, options, output, display)
            _tell_left_out(systems, output, display)
            done = _Work(experiment, plan, systems, output, display, jobs).run()
        return _report(experiment, plan, systems, done, output, command, title, jobs)


def _systems(experiment: Experiment, options: Options, output: Path, display: Display) -> list[System]:
    """The systems with their costs; counted each time, since it takes no more than a forward of each."""
    with quiet(own_notes=False), display.step("counting FLOPs"):
        torch.manual_seed(experiment.seed)
        sparse, data = experiment.build(SPARSE)
        assert isinstance(sparse, SparseModule)
        data.prepare_data()
        data.setup("fit")
        loader = data.val_dataloader()
        if not len(loader):
            raise ValueError("the data has no validation split, which the learning rates are chosen by (data.val_size)")
        systems = find_systems(sparse, next(iter(loader)), options.baselines, options.routers)
    write_json(output / "systems.json", [s.to_dict() for s in systems])
    for system in systems:
        if system.refused:
            display.say(f"{label(system.name)} is left out: {system.refused}")
    return systems


def _tell_left_out(systems: Sequence[System], output: Path, display: Display) -> None:
    """Name the systems that have finished runs in ``output`` and are not among those asked for."""
    shown = {system.name for system in systems}
    found = sorted({path.parts[-3] for path in _results(output) if path.name == "result.json"} - shown)
    if found:
        names = "; ".join(label(name) for name in found)
        display.say(f"not asked for this time: {names}. The finished runs are kept, and shown again when asked for")


def _results(output: Path) -> list[Path]:
    """Return the files that hold what was trained and measured in ``output``, whoever asked for it."""
    return [*(output / "units").glob("*/*/result.json"), *output.glob("speed.json")]


class _Work:
    """The units of a plan, in order."""

    def __init__(
        self, experiment: Experiment, plan: Plan, systems: Sequence[System], output: Path, display: Display, jobs: int
    ) -> None:
        self.experiment, self.plan, self.output, self.display, self.jobs = experiment, plan, output, display, jobs
        self.systems = [s for s in systems if not s.refused]
        self.higher = experiment.monitor_mode == "max"

    def run(self) -> dict[str, Any]:
        searched = {s.name: self._search_units(s) for s in self.systems}
        count = sum(len(u) for u in searched.values()) + len(self.systems) * len(self.plan.seeds)
        self.display.start(count + (1 if self.plan.options.rounds else 0))
        results = self._train([u for units in searched.values() for u in units])
        searches = {name: [results[u] for u in units] for name, units in searched.items()}
        rates = {s.name: self._choose(s, searched[s.name], searches[s.name]) for s in self.systems}
        units = {s.name: self.plan.final_units(s.name, rates[s.name][0], s.tunes) for s in self.systems}
        # Seed by seed, so that a stopped comparison has whole pairs.
        results = self._train([units[s.name][i] for i in range(len(self.plan.seeds)) for s in self.systems])
        finals = {name: [results[u] for u in of_system] for name, of_system in units.items()}
        checkpoints = {s.name: units[s.name][0].checkpoint(self.output) for s in self.systems if s.cost}
        speeds = self._speeds(checkpoints)
        done = {"searches": searches, "rates": rates, "finals": finals, "speeds": speeds, "checkpoints": checkpoints}
        return {**done, "examples": {name: [u.examples(self.output) for u in own] for name, own in units.items()}}

    def _search_units(self, system: System) -> list[Unit]:
        if system.cost:
            return self.plan.search_units(system.name)
        return self.plan.tuning_units(system.name) if system.tunes else []

    def _train(self, units: Sequence[Unit]) -> dict[Unit, Any]:
        """Do what is not done yet."""
        results = {u: u.read(self.output) for u in units}
        left = [u for u, result in results.items() if result is None]
        self.display.advance(len(units) - len(left))

        def finished(unit: Unit, result: dict[str, Any]) -> None:
            results[unit] = result
            self.display.finished(describe(unit))
            self.display.say(f"{describe(unit)}: {self._found(result)}")

        def progress(unit: Unit, done: int, total: int) -> None:
            self.display.unit(describe(unit), done, total)

        if self.jobs > 1 and len(left) > 1:
            train_all(
                self.experiment.arguments, left, self.output, self.jobs, self.experiment.modules, progress, finished
            )
        else:
            for u in left:
                finished(u, train(self.experiment, u, self.output, functools.partial(progress, u)))
                gc.collect()
        return results

    def _found(self, result: Mapping[str, Any]) -> str:
        if "settings" in result:
            return tuned(result)
        if result["quality"] is None:
            return f"diverged ({result['diverged']})"
        metric = self.experiment.monitor.partition("/")[2]
        text = f"validation {metric} {result['quality']:.4g}"
        if "test_quality" in result:
            text += f", test {result['test_quality']:.4g}"
        return f"{text}, {result['train_seconds']:.1f} s"

    def _choose(self, system: System, units: Sequence[Unit], results: Sequence[Any]) -> tuple[float | None, bool]:
        if system.cost is None:
            return None, False
        if not units:
            return self.plan.rates[0], False
        try:
            index = choose(self.plan.rates, [r["quality"] for r in results], self.plan.configured_rate, self.higher)
        except ValueError as error:
            raise ValueError(f"{label(system.name)}: {error}; give lower --learning_rates") from None
        return self.plan.rates[index], at_edge(self.plan.rates[index], self.plan.rates)

    def _speeds(self, checkpoints: Mapping[str, Path]) -> dict[str, Any]:
        """Return what is measured of each system, all in one session: the machine's mood is in ratios of several."""
        path, rounds = self.output / "speed.json", self.plan.options.rounds
        saved = read_json(path) or {}
        found = {name: saved[name] for name in checkpoints if name in saved}
        if len({of.get("measured") for of in found.values()}) > 1:
            found = {}
        if rounds and not (
            found.keys() == checkpoints.keys() and all(len(of["train_rounds"]) == rounds for of in found.values())
        ):
            found = self._measure(checkpoints)
            write_json(path, {**saved, **found})  # what was measured of systems that are left out stays
        if rounds:
            self.display.finished("speed and memory")
        return found

    def _measure(self, checkpoints: Mapping[str, Path]) -> dict[str, Any]:
        threads = max(1, torch.get_num_threads() // self.jobs)  # as in training
        jobs = {
            name: Job(self.experiment.arguments, name, str(file), self.experiment.replaced, threads)
            for name, file in checkpoints.items()
        }
        show = functools.partial(self.display.unit, "speed and memory")
        found = measure(jobs, self.plan.options.rounds, show, self.experiment.modules)
        when = _day(time.time())
        return {name: {**of, "measured": when} for name, of in found.items()}


def _day(seconds: float) -> str:
    """Return a moment of ``time.time`` as people and machines read it."""
    return datetime.datetime.fromtimestamp(seconds).astimezone().isoformat(timespec="seconds")


def describe(unit: Unit) -> str:
    """A unit in words."""
    what = f"seed {unit.seed}" if unit.final else "search"
    rate = "" if unit.rate is None else f" at learning rate {unit.rate:g}"
    return f"[{label(unit.system)}] {what}{rate}"


def _report(
    experiment: Experiment,
    plan: Plan,
    systems: Sequence[System],
    done: Mapping[str, Any],
    output: Path,
    command: str,
    title: str,
    jobs: int,
) -> Outcome:
    metric = f"test/{experiment.monitor.partition('/')[2]}"
    with quiet(own_notes=False):
        module = experiment.module(SPARSE)
    assert isinstance(module, SparseModule)
    signatures = dict(module.metric_signatures)
    summary = summarize(
        systems,
        done["finals"],
        done["rates"],
        done["speeds"],
        metric,
        experiment.monitor_mode == "max",
        plan.seeds,
        experiment.shown_metrics,
        experiment.average_last,
        _compare_examples(module, done["examples"], plan.seeds),
        {s.name: done["searches"][s.name][0] for s in systems if s.tunes and s.name in done["searches"]},
    )
    path = output / "results.json"
    worked = path.exists() and any(f.stat().st_mtime_ns > path.stat().st_mtime_ns for f in _results(output))
    saved = None if worked else read_json(path)
    about = saved["machine"] if saved else {**machine(), "jobs": jobs}
    # A comparison that is shown again keeps the day it was finished, also where fewer systems are shown.
    date = saved["date"] if saved else _day(time.time())
    results = {
        "title": title,
        "command": command,
        "date": date,
        "machine": about,
        **plan.to_dict(),
        **({"signatures": signatures} if signatures else {}),
        "summary": summary.to_dict(),
        "searches": done["searches"],
        "finals": done["finals"],
        "speed": done["speeds"],
    }
    write_json(path, results)
    picture = table.picture(title, summary, output / "quality_against_flops.png")
    m = about
    rates = ", ".join(f"{r:g}" for r in plan.rates)
    share = "" if plan.options.search_share == 1 else f" and {plan.options.search_share:g} of the training"
    searched = f"Learning rates tried for each system, with seed {plan.search_seed}{share}: {rates}."
    facts = [
        searched if len(plan.rates) > 1 else f"One learning rate for all: {rates}.",
        f"Seeds {', '.join(map(str, plan.seeds))}.",
        f"{date}, on {m['device']} ({m['threads']} threads, {m['jobs']} runs at a time), torch {m['torch']}, "
        f"Python {m['python']}.",
        *(f"{name}: {signature}." for name, signature in signatures.items()),
        *([f"Command: `{command}`"] if command else []),
    ]
    # Of the first seed of each system that kept any.
    kept = {label(name): of_seeds[0] for name, of_seeds in done["examples"].items() if of_seeds and of_seeds[0]}
    read = module.side_by_side(kept) if SPARSE in kept else ""
    page = write_text(output / "table.md", table.markdown(title, summary, facts, read))
    table.show(title, summary)
    if read:
        print(f"\n{read}")
    files = tuple(p for p in (page, path, picture) if p is not None)
    print("\n".join(["", "written:", *(f"  {p}" for p in files)]))
    return Outcome(summary, output, experiment.arguments, files, done["checkpoints"])


def _compare_examples(
    module: SparseModule, examples: Mapping[str, Sequence[list[dict[str, Any]]]], seeds: Sequence[int]
) -> list[ExamplePair]:
    """The sparse model beside each other one, seed by seed, where both kept their test examples."""
    found = []
    for name, of_seeds in examples.items():
        if name == SPARSE or name.startswith(routers.PREFIX):
            continue
        for seed, mine, its in zip(seeds, examples[SPARSE], of_seeds, strict=True):
            if mine and its:
                found.append(ExamplePair(name, seed, tuple(module.compare_examples(mine, its))))
    return found


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    from importlib.metadata import PackageNotFoundError, version

    versions = {}
    for package in ("moesaic", "lightning", "timm", "torchvision", "scikit-learn"):
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name()
    return {
        "device": device,
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "packages": versions,
    }


class Display:
    """One bar for the whole comparison and one for the unit at work; on a pipe, the finished units alone."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

        self.console = Console()
        self.bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self.total = self.bars.add_task("comparison", total=None)
        self.tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Display:
        self.bars.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.bars.stop()

    def start(self, units: int) -> None:
        self.bars.update(self.total, total=units)

    def advance(self, units: int) -> None:
        self.bars.advance(self.total, units)

    def unit(self, name: str, done: int, total: int) -> None:
        """Show how far a unit is."""
        task = self.tasks.get(name)
        if task is None:
            task = self.tasks[name] = self.bars.add_task(name, total=None)
        self.bars.update(task, completed=done, total=total or None)

    def finished(self, name: str) -> None:
        """A unit is done."""
        task = self.tasks.pop(name, None)
        if task is not None:
            self.bars.remove_task(task)
        self.bars.advance(self.total)

    def say(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        task = self.bars.add_task(name, total=None)
        try:
            yield
        finally:
            self.bars.remove_task(task)
