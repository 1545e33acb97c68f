"""The command line of ``moesaic compare``, and the order of its work."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import gc
import platform
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from apps import routers
from apps.cli import UsageError, is_termination
from apps.cli.parser import Parser
from apps.cli.request import shipped
from apps.compare import table
from apps.compare.experiment import Experiment, arguments
from apps.compare.files import differences, locked, read_json, write_json, write_text
from apps.compare.measure import Job, measure
from apps.compare.parallel import train_all
from apps.compare.plan import Options, Plan, at_edge
from apps.compare.stats import choose
from apps.compare.summary import ExamplePair, Summary, summarize
from apps.compare.systems import SPARSE, System, find_systems, label
from apps.compare.training import Unit, train
from apps.machine import cpu_name
from apps.quiet import quiet
from apps.training import SparseModule

if TYPE_CHECKING:
    from rich.progress import TaskID


_DESCRIPTION = """\
Train the sparse model of a configuration and dense ones of equal cost on the same data and steps, each with the same
learning-rate search on validation data, and compare them on test data."""

_EPILOG = """\
Any value of the configuration may be given as well, as for moesaic fit: --trainer.max_epochs 5,
--model.moe.num_experts 16, --seed_everything 7. Stopped at any moment, the same command goes on; a finished comparison
takes more --seeds, --baselines and --routers, and does what is new."""


def _parser() -> Parser:
    parser = Parser(
        prog="moesaic compare",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=_DESCRIPTION,
        epilog=_EPILOG,
    )
    add = parser.add_argument
    add("config", help="configuration of the sparse model")
    overlay = "another configuration over it, such as configs/debug.yaml; may be given again"
    add("--config", "-c", dest="overlays", action="append", default=[], metavar="FILE", help=overlay)
    add("--output", metavar="DIR", help="folder of the comparison (default: runs/compare/<config name>)")
    add("--seeds", type=int, default=3, metavar="N", help="runs of each model (default: 3)")
    add("--baselines", nargs="+", metavar="NAME", help="those to train, such as dense_equal_flops (default: all)")
    each = "also with the routers of these overlays, at equal active FLOPs: names of configs/routing, files, or all"
    add("--routers", nargs="+", metavar="NAME", default=[], help=f"{each}; no baselines then but those named")
    rates = "tried for each model; one: no search (default: the config's, a third and 3 times it)"
    add("--learning_rates", nargs="+", type=float, default=[], metavar="LR", help=rates)
    share = "part of the training that a run of the search has (default: 1)"
    add("--search_share", type=float, default=1.0, metavar="SHARE", help=share)
    rounds = "timed rounds of speed; 0 measures neither speed nor memory (default: 5)"
    add("--rounds", type=int, default=5, metavar="N", help=rounds)
    jobs = "runs at a time; each has its part of the cores, which small models use better so (default: 1)"
    add("--jobs", type=int, default=1, metavar="N", help=jobs)
    return parser


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


def run_command(argv: Sequence[str], title: str | None = None) -> Outcome:
    """As ``run``, and return what came out of it; ``title`` is that of the table."""
    args, rest = _parser().parse_known_args(list(argv))
    for number, word in enumerate(rest):
        is_value = bool(number) and not word.startswith("--") and "=" not in rest[number - 1]
        if not (is_value or (word.startswith("--") and ("." in word or word.startswith("--seed_everything")))):
            raise UsageError(f"{word} is no option of moesaic compare (--help lists them)")
    if args.jobs < 1:
        raise UsageError(f"--jobs {args.jobs} must be at least 1")
    names = routers.resolve(args.routers)
    baselines = args.baselines if args.baselines is not None or not names else []
    options = Options(
        num_seeds=args.seeds,
        learning_rates=tuple(args.learning_rates),
        search_share=args.search_share,
        baselines=None if baselines is None else tuple(baselines),
        rounds=args.rounds,
        routers=names,
    )
    config, *overlays = (str(shipped(Path(p))) for p in (args.config, *args.overlays))  # each process reads them
    name = "-".join(Path(p).stem for p in (config, *overlays))
    output = Path(args.output) if args.output else Path("runs") / "compare" / name
    read = arguments(config, overlays, rest, names)
    return compare(
        read,
        options,
        output,
        command=command_line(argv),
        title=title or f"{'Routers' if names else 'Sparse and dense'}: {name}",
        jobs=args.jobs,
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


class _Work:
    """The units of a plan, in order."""

    def __init__(
        self, experiment: Experiment, plan: Plan, systems: Sequence[System], output: Path, display: Display, jobs: int
    ) -> None:
        self.experiment, self.plan, self.output, self.display, self.jobs = experiment, plan, output, display, jobs
        self.systems = [s for s in systems if not s.refused]
        self.higher = experiment.monitor_mode == "max"

    def run(self) -> dict[str, Any]:
        searched = {s.name: self.plan.search_units(s.name) if s.cost else [] for s in self.systems}
        count = sum(len(u) for u in searched.values()) + len(self.systems) * len(self.plan.seeds)
        self.display.start(count + (1 if self.plan.options.rounds else 0))
        results = self._train([u for units in searched.values() for u in units])
        searches = {name: [results[u] for u in units] for name, units in searched.items()}
        rates = {s.name: self._choose(s, searched[s.name], searches[s.name]) for s in self.systems}
        units = {s.name: self.plan.final_units(s.name, rates[s.name][0]) for s in self.systems}
        # Seed by seed, so that a stopped comparison has whole pairs.
        results = self._train([units[s.name][i] for i in range(len(self.plan.seeds)) for s in self.systems])
        finals = {name: [results[u] for u in of_system] for name, of_system in units.items()}
        checkpoints = {s.name: units[s.name][0].checkpoint(self.output) for s in self.systems if s.cost}
        speeds = self._measure(checkpoints) if self.plan.options.rounds else {}
        done = {"searches": searches, "rates": rates, "finals": finals, "speeds": speeds, "checkpoints": checkpoints}
        return {**done, "examples": {name: [u.examples(self.output) for u in own] for name, own in units.items()}}

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

    def _measure(self, checkpoints: Mapping[str, Path]) -> dict[str, Any]:
        path = self.output / "speed.json"
        found = read_json(path)
        if found is None or found.keys() != checkpoints.keys():  # side by side, or the machine's mood is in the ratios
            threads = max(1, torch.get_num_threads() // self.jobs)  # as in training
            jobs = {
                name: Job(self.experiment.arguments, name, str(file), self.experiment.replaced, threads)
                for name, file in checkpoints.items()
            }
            show = functools.partial(self.display.unit, "speed and memory")
            found = measure(jobs, self.plan.options.rounds, show, self.experiment.modules)
            write_json(path, found)
        self.display.finished("speed and memory")
        return found


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
        experiment.table_metrics,
        experiment.average_last,
        _compare_examples(module, done["examples"], plan.seeds),
    )
    about = {**machine(), "jobs": jobs}
    path = output / "results.json"
    saved = read_json(path)
    if saved and differences({name: saved.get(name) for name in plan.to_dict()}, plan.to_dict()):
        saved = None  # of fewer seeds or systems
    # Of a comparison shown again, the day it was finished.
    date = saved["date"] if saved else datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    results = {
        "title": title,
        "command": command,
        "date": date,
        "machine": saved["machine"] if saved else about,
        **plan.to_dict(),
        **({"signatures": signatures} if signatures else {}),
        "summary": summary.to_dict(),
        "searches": done["searches"],
        "finals": done["finals"],
        "speed": done["speeds"],
    }
    write_json(path, results)
    picture = table.picture(title, summary, output / "quality_against_flops.png")
    m = results["machine"]
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
