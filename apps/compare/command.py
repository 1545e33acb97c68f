"""The command ``moesaic compare``: it reads the options, does the work and writes the report."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from apps.base.files import read_json, write_json, write_text
from apps.base.machine import machine_facts, moment
from apps.base.progress import bar, say, set_aside
from apps.base.quiet import quiet
from apps.cli.errors import stopped
from apps.compare.experiment import Experiment, arguments, validation_batch
from apps.compare.options import Command
from apps.compare.page import comparison_page, cost_charts
from apps.compare.summary import ExamplePair, Results, Summary, summarize
from apps.compare.systems import SPARSE, System, find_systems, label
from apps.compare.training import interruptible, same_threads
from apps.compare.work import Plan, Work, result_files, sections_of_use, tell_changed
from apps.equal_cost import routers
from apps.equal_cost.own_model import OwnModel
from apps.report.page import FILE, Page, Section, open_page, save_charts, show_page, write_page
from apps.report.page.writing import markdown, write_index
from apps.runner.runner import at_work


def run(argv: Sequence[str]) -> int:
    """Run ``moesaic compare ARGV``, and return 0, 130 where the user stopped it, or 143 where the system did.

    Raises:
        UsageError: a wrong option.
        ValueError: a wrong value, a rejected comparison, or a folder with another one.
    """
    return until_stopped(lambda: run_command(argv), command_line(argv))


def until_stopped(work: Callable[[], object], command: str) -> int:
    """Do work whose units are kept, and return 0, or the exit status of a stop, after a line with ``command``."""
    try:
        work()
    except (KeyboardInterrupt, SystemExit) as stop:
        return stopped(stop, f"; what is finished is kept. To continue: {command}")
    return 0


def command_line(argv: Sequence[str], command: str = "compare") -> str:
    """Return the shell command of ``argv``, with paths relative to the current folder."""
    here = f"{Path.cwd()}/"
    return shlex.join(["moesaic", command, *(a.removeprefix(here) for a in argv)])


@dataclass(frozen=True)
class Outcome:
    """A finished comparison.

    Attributes:
        summary: numbers of the comparison.
        output: folder of the comparison.
        files: files next to the report: the table, the JSON file, the picture.
        page: the report.
    """

    summary: Summary
    output: Path
    files: tuple[Path, ...]
    page: Page


@interruptible()
def run_command(argv: Sequence[str], title: str | None = None) -> Outcome:
    """Do the comparison of ``moesaic compare ARGV``, or the rest of it, and show the table.

    ``title`` is the heading of the table and the picture; without it they name the configurations.

    Raises:
        UsageError, ValueError: see ``run``.
        NonFiniteError: a final run diverged.
    """
    asked = Command.read(argv)
    options, output = asked.options, asked.folder
    config, overlays = str(asked.config), [*map(str, asked.overlays)]
    with quiet(own_notes=False):
        experiment = Experiment(arguments(config, overlays, asked.rest, options.routers))
    plan = Plan.make(experiment.plain(), options, experiment.rate, experiment.seed)
    with ExitStack() as stack, at_work(output, "comparison", title or "") as whole:
        systems = find_all(experiment, asked)
        plan.claim(output)  # after what may be wrong with the systems, which can then be asked for again
        tell_changed(experiment.modules, output)
        write_json(output / "systems.json", [asdict(s) for s in systems])
        _tell_left_out(systems, output)
        stack.enter_context(same_threads(experiment, systems, output, asked.jobs))
        work = Work(experiment, plan, systems, output, whole, asked.jobs)
        results = work.do()
        with bar("what the experts are used for"):
            use = sections_of_use(experiment, results.checkpoints[SPARSE], output)
        title = title or f"{'Routers' if options.routers else 'Sparse and dense'}: {asked.name}"
        outcome = _report(work, systems, results, use, title, command_line(argv))
    write_index(output.parent)
    if asked.open:
        open_page(output / FILE)
    return outcome


def find_all(experiment: Experiment, asked: Command) -> list[System]:
    """Return the systems with their costs, which take a forward of each and are counted every time.

    Raises:
        ValueError: a system that is asked for by name cannot be compared.
    """
    options = asked.options
    with quiet(own_notes=False), bar("counting FLOPs"):
        torch.manual_seed(experiment.seed)
        sparse, data = experiment.build(SPARSE, seed=experiment.seed)
        batch = validation_batch(data, "the learning rates are chosen by")
        if options.rounds and isinstance(sparse, OwnModel):
            sparse.configure_optimizers(experiment.still(data))  # rejected now, and not after the training
        systems = find_systems(sparse, batch, options.baselines, options.routers)
        warnings: Sequence[str] = getattr(data, "warnings", list)()
    for warning in warnings:
        say(f"check: {warning}")
    for system in systems:
        if system.refused and system.name in asked.named:
            raise ValueError(f"{system.title} cannot be compared: {system.refused}")
        if system.refused:
            say(f"{system.title} is left out: {system.refused}")
    return systems


def _tell_left_out(systems: Sequence[System], output: Path) -> None:
    """Name the systems that have finished runs in ``output`` and are not among those asked for."""
    asked = {system.name for system in systems}
    kept = sorted({path.parts[-3] for path in result_files(output) if path.name == "result.json"} - asked)
    if kept:
        names = "; ".join(label(name) for name in kept)
        say(f"not asked for this time: {names}. The finished runs are kept, and shown again when asked for")


def _report(
    work: Work, systems: Sequence[System], results: Results, use: Sequence[Section], title: str, command: str
) -> Outcome:
    """Write the report, the table, the numbers and the picture, and show the verdict and figures."""
    experiment, plan, output = work.experiment, work.plan, work.output
    with quiet(own_notes=False):
        module: Any = experiment.module(SPARSE)
    summary = summarize(
        systems,
        results,
        plan.seeds,
        metric=experiment.test_monitor,
        higher_is_better=experiment.monitor_mode == "max",
        further=experiment.shown_metrics,
        tasks=experiment.task_metrics,
        average_last=experiment.average_last,
        examples=_example_pairs(module, results, plan.seeds),
    )
    path = output / "results.json"
    worked = path.exists() and any(f.stat().st_mtime_ns > path.stat().st_mtime_ns for f in result_files(output))
    # A comparison that is shown again keeps machine and day of its work, also where fewer systems are shown.
    now = {"date": moment(), "machine": {**machine_facts(), "jobs": work.jobs}}
    saved = (None if worked else read_json(path)) or now
    signatures = dict(module.metric_signatures)
    numbers = {
        "title": title,
        "command": command,
        "date": saved["date"],
        "machine": saved["machine"],
        **plan.to_dict(),
        **({"signatures": signatures} if signatures else {}),
        "summary": asdict(summary),
        "searches": results.searches,
        "finals": results.finals,
        "speed": results.speeds,
    }
    write_json(path, numbers)
    first_seed = {label(name): of_seeds[0] for name, of_seeds in results.examples.items() if of_seeds and of_seeds[0]}
    examples = module.comparison.side_by_side(first_seed) if SPARSE in first_seed else ""
    facts = _facts(plan, numbers, experiment.num_windows)
    page = comparison_page(title, summary, results, numbers, facts, examples, use)
    text = write_text(output / "table.md", markdown(replace(page, figures=None)))  # a later table has all figures
    with set_aside():
        print(f"\n{title}")
        show_page(page)
    by_flops = cost_charts(summary)[:1]
    picture = save_charts(by_flops, output / "quality_against_flops.png", title) if by_flops else None
    files = tuple(filter(None, (text, path, picture)))
    say(f"as text, numbers and a picture: {', '.join(map(str, files))}")
    write_page(page, output / FILE)
    return Outcome(summary, output, files, page)


def _example_pairs(module: Any, results: Results, seeds: Sequence[int]) -> list[ExamplePair]:
    """Return the comparisons of the sparse model with each other one, where both kept their test examples."""
    return [
        ExamplePair(name, seed, tuple(module.comparison.compare_examples(sparse, other)))
        for name, of_seeds in results.examples.items()
        if name != SPARSE and not name.startswith(routers.PREFIX)
        for seed, sparse, other in zip(seeds, results.examples[SPARSE], of_seeds, strict=True)
        if sparse and other
    ]


def _facts(plan: Plan, numbers: Mapping[str, Any], num_windows: int) -> list[str]:
    """Return lines for the page that say how the comparison was made."""
    rates, machine = ", ".join(f"{r:g}" for r in plan.rates), numbers["machine"]
    share = "" if plan.options.search_share == 1 else f" and {plan.options.search_share:g} of the training"
    searched = f"Learning rates tried for each system, with seed {plan.search_seed}{share}: {rates}."
    windows = [f"The seeds take the {num_windows} windows or draws of the split in turn: intervals are over both."]
    return [
        searched if len(plan.rates) > 1 else f"One learning rate for all: {rates or 'that of the model'}.",
        f"Seeds {', '.join(map(str, plan.seeds))}.",
        *(windows if num_windows > 1 else []),
        f"{numbers['date']}, on {machine['device']} ({machine['threads']} threads, {machine['jobs']} runs at a time), "
        f"torch {machine['torch']}, Python {machine['python']}.",
        *(f"{name}: {signature}." for name, signature in numbers.get("signatures", {}).items()),
        f"Command: `{numbers['command']}`",
    ]
