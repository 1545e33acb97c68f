"""The command ``moesaic verdict``: it reads the data, plans, does the runs and writes their results."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

import core
from apps.base.files import delete, read_json, replacing, write_json, write_text
from apps.base.machine import machine_facts, moment
from apps.base.messages import some
from apps.base.progress import bar, say
from apps.base.quiet import quiet
from apps.compare.command import command_line, until_stopped
from apps.compare.experiment import Experiment, arguments, length_of, validation_batch
from apps.compare.options import SEARCH_FACTORS as FACTORS
from apps.compare.summary import means
from apps.compare.systems import SPARSE, System, find_systems, label, of_equal_flops
from apps.compare.training import interruptible, same_threads
from apps.data.given import GivenData
from apps.report.page import FILE, open_page, write_page
from apps.report.page.writing import markdown, write_index
from apps.runner.runner import Budget, at_work, check_same
from apps.task.task import config_of
from apps.verdict.options import VerdictOptions
from apps.verdict.references import RESERVED, References, best_model, by_task, reference_names
from apps.verdict.result import NUMBERS, PAGE, Facts, Verdict, causes, changes, lines, verdict_page
from apps.verdict.schedule import Schedule, Speed, make_schedule
from apps.verdict.training import VALIDATION_NEED, measure_speed
from apps.verdict.work import Plan, Work, answers

RESERVE_SHARE, LEAST_RESERVE, MOST_RESERVE = 0.03, 1.0, 20.0
"""Part of the seconds that is kept for the end, when the result is written, with its limits in seconds."""

EVALUATION_SHARE = 0.01
"""Part of the budget that one evaluation may take: a larger split is evaluated by its first batches."""


def run(options: VerdictOptions, argv: Sequence[str], began: float) -> int:
    """Run ``moesaic verdict``, and return 0, 130 where the user stopped it, or 143 where the system did.

    Args:
        options: the command line.
        argv: its words, for the command to repeat.
        began: time of ``time.monotonic`` at which the process began.

    Raises:
        UsageError, ValueError: wrong data, a rejected model, or a budget that fits no run.
    """
    command = command_line(argv, "verdict")

    def give_and_show() -> None:
        verdict = give_verdict(options, command, began)
        if options.open:
            open_page(options.folder / FILE)
        print("\n".join([f"written: {options.folder / PAGE}, {options.folder / NUMBERS}", *lines(verdict)]))

    return until_stopped(give_and_show, command)


@interruptible()
def give_verdict(
    options: VerdictOptions, command: str, began: float | None = None, clock: Callable[[], float] = time.monotonic
) -> Verdict:
    """Do the rest of a verdict, write it, and return it.

    Raises:
        ValueError: as ``run``, or a folder with another verdict.
        NonFiniteError: a final run diverged.
    """
    output = options.folder
    check_folder(options)
    with contextlib.ExitStack() as stack, at_work(output, "verdict") as whole:
        saved = read_json(output / "plan.json")
        if saved is None:  # a set-up that failed or was killed leaves nothing
            for name in _BEFORE_THE_PLAN:
                delete(output / name)
        seconds = 60 * options.minutes
        budget = Budget(seconds, output / "spent.json", clock, began, reserve(seconds))
        with quiet(own_notes=False):
            path, notes, found = configuration(options)
            experiment = Experiment(arguments(path, [], options.rest))
        with quiet(own_notes=False), bar("making the two models"):
            model, sparse, dense, warnings = _systems(experiment)
        if warnings:
            how = "--exclude COLUMN" if options.target else "--data.exclude=[COLUMN]"
            warnings = [*warnings, f"{how} leaves a column out."]
        warnings = [*found, *warnings]
        for line in (*notes, *(f"check: {warning}" for warning in warnings)):
            say(line)
        names = reference_names(model)
        kept = RESERVED * seconds if names else 0.0
        budget.reserve += kept
        stack.enter_context(same_threads(experiment, (sparse, dense), output))
        if saved is not None:
            plan = _read(saved)
        else:
            plan = _plan(experiment, dense.name, _num_experts(model), options, budget)
            write_json(output / "plan.json", {"options": _identity(options), **dataclasses.asdict(plan)})
        del model
        work = Work(experiment, plan, options.seed, output, budget, whole)
        work.do()
        budget.reserve -= kept
        best = _best(work, names, options) if names and work.finished else ()
        if work.num_done:  # a finished verdict that is shown again takes none of its time
            budget.keep()
        verdict = _verdict(options, work, (sparse, dense), notes, warnings, command, best)
        write_json(output / NUMBERS, {**dataclasses.asdict(verdict), "last_line": verdict.last_line})
        page = verdict_page(verdict)
        write_text(output / PAGE, markdown(page))
        write_page(page, output / FILE)
        write_index(output.parent)
    return verdict


def _best(work: Work, names: Sequence[str], options: VerdictOptions) -> tuple[str, ...]:
    """Train the references of a table, and return a sentence for each task on its best model."""
    num_values = len(work.finished[0].values[0])
    references = References(work.experiment, names, options.folder, options.minutes, options.seed, num_values)
    models = by_task(work.finished, references.do(), work.plan.dense)
    return tuple(best_model(task, own, work.plan.dense) for task, own in models.items())


_BEFORE_THE_PLAN = ("data", "config.yaml", "spent.json", "threads.json")


def reserve(seconds: float) -> float:
    """Return the seconds that are kept for the end."""
    return min(max(RESERVE_SHARE * seconds, LEAST_RESERVE), MOST_RESERVE)


def check_folder(options: VerdictOptions) -> None:
    """Reject a folder that is not this verdict's.

    Raises:
        ValueError: the folder holds another verdict, or files that are none.
    """
    output, saved = options.folder, read_json(options.folder / "plan.json")
    if saved is not None:
        check_same(output, "verdict", saved.get("options"), _identity(options))
    elif output.is_dir():
        others = [path.name for path in output.iterdir() if path.name not in (*_BEFORE_THE_PLAN, ".lock")]
        if others:
            raise ValueError(f"{output} holds {some(sorted(others), 3)} and no verdict: give another --output")


def _identity(options: VerdictOptions) -> dict[str, Any]:
    """Return what tells one verdict from another."""
    return {
        "data": [str(path.resolve()) for path in options.data],
        "target": options.target[0] if len(options.target) == 1 else list(options.target) or None,
        "kind": options.kind,
        **{name: getattr(options, name) for name in ("exclude", "time", "user") if getattr(options, name)},
        "minutes": options.minutes,
        "seed": options.seed,
        "rest": list(options.rest),
    }


def _systems(experiment: Experiment) -> tuple[Any, System, System, Sequence[str]]:
    """Return the sparse model, its system and the dense one of equal FLOPs, with their costs, and warnings of the data.

    Raises:
        ValueError: the model has no MoE layer, no dense one of equal FLOPs, or the data no validation split.
    """
    torch.manual_seed(experiment.seed)
    model, data = experiment.build(SPARSE)
    if not model.comparison.moe_block_names:
        raise ValueError(f"{type(model.module).__name__} has no MoE layer: a verdict starts from a sparse model")
    sparse, dense = find_systems(model, validation_batch(data, VALIDATION_NEED), [of_equal_flops(model)])
    return model, sparse, dense, getattr(data, "warnings", list)()


def _plan(experiment: Experiment, dense: str, num_experts: int, options: VerdictOptions, budget: Budget) -> Plan:
    """Measure the speed of both systems and return what fits into the seconds that are left.

    Raises:
        ValueError: three seeds do not fit.
    """
    speeds: dict[str, Speed] = {}
    loaders: dict[str, Any] = {}
    endless = Budget(clock=budget.clock)  # too small a budget is told what would do
    for _ in range(2):  # the first round warms up
        if speeds and budget.left <= 0:
            break
        for name in (SPARSE, dense):
            with bar(f"measuring the speed of {label(name)}"):
                speeds[name], loaders = measure_speed(experiment, name, endless, budget.seconds)
    seconds_per_batch = max(max(speed.validation, speed.test) for speed in speeds.values())
    fits = max(1, math.floor(EVALUATION_SHARE * budget.seconds / seconds_per_batch))
    counts = {name: length_of(loader) for name, loader in loaders.items()}
    for name in ("val", "test"):
        if math.isinf(counts[name]):  # a stream tells its length by being read
            counts[name] = sum(1 for _ in itertools.islice(loaders[name], fits + 1))
    most_batches = None if max(counts["val"], counts["test"]) <= fits else fits

    def evaluated(name: str) -> float:
        return min(counts[name], math.inf if most_batches is None else most_batches)

    # A final run evaluates the test split and about as many training examples.
    speeds = {
        name: Speed(
            speed.step,
            speed.start,
            speed.validation * evaluated("val"),
            2 * speed.test * evaluated("test"),
        )
        for name, speed in speeds.items()
    }
    rate = experiment.rate
    rates = () if rate is None else tuple(sorted(float(f"{factor * rate:.3g}") for factor in FACTORS))
    most_steps = experiment.num_steps(counts["train"])
    start_seconds = max(speed.start for speed in speeds.values())
    budget.hold_back(3 * start_seconds)
    schedule = make_schedule(budget.left, most_steps, rates, speeds, options.minutes)
    num_batches = None if math.isinf(counts["train"]) else int(counts["train"])
    seconds = {name: speed.step for name, speed in speeds.items()}
    return Plan(schedule, dense, num_experts, most_batches, seconds, start_seconds, num_batches, most_steps)


def _num_experts(model: Any) -> int:
    """Return the number of experts of the MoE layer that has most."""
    layers = core.moe_layers(model.module).values()
    return max((m.num_experts for layer in layers for m in layer.modules() if isinstance(m, core.Experts)), default=0)


def _read(saved: Mapping[str, Any]) -> Plan:
    values, schedule = {name: value for name, value in saved.items() if name != "options"}, saved["schedule"]
    return Plan(**{**values, "schedule": Schedule(schedule["seeds"], schedule["steps"], tuple(schedule["rates"]))})


def _verdict(
    options: VerdictOptions,
    work: Work,
    costs: Sequence[System],
    notes: Sequence[str],
    checks: Sequence[str],
    command: str,
    best: tuple[str, ...] = (),
) -> Verdict:
    """Return the results of the finished runs."""
    plan, finished = work.plan, work.finished
    both = answers(finished)
    unknown = {"name": "quality", "higher_is_better": True}
    first: Mapping[str, Any] = finished[0].results[0] if finished else unknown
    reasons: list[str] = []
    systems: dict[str, dict[str, Any]] = {}
    if finished:
        titles = {"sparse": SPARSE, "dense, equal FLOPs": plan.dense, "sparse, equal time": SPARSE}
        systems = {
            title: _figures([f.results[i] for f in finished], work.rates[name])
            for i, (title, name) in enumerate(titles.items())
        }
        sparse_facts, dense_facts, _ = (_facts(own, first["higher_is_better"]) for own in systems.values())
        passes = work.steps / plan.train_batches if plan.train_batches else 0.0
        reasons = causes(both, sparse_facts, dense_facts, plan.num_experts, passes)
    made = [f"Dense: {costs[1].note}."] if costs[1].note else []
    made += ["The time was up before all planned runs were finished."] if work.is_over else []
    if plan.most_batches is not None:
        made.append(f"Each evaluation takes the first {plan.most_batches} batches of a split: all would take too long.")
    return Verdict(
        title=" and ".join(path.name for path in options.data) + "".join(f", {column}" for column in options.target),
        quality=first["name"],
        higher_is_better=first["higher_is_better"],
        answers=both,
        systems=systems,
        seeds=tuple(f.seed for f in finished),
        reasons=tuple(reasons),
        changes=tuple(changes(both, reasons, options.minutes, work.steps / plan.configured_steps)),
        notes=(*notes, *made),
        checks=tuple(checks),
        best=best,
        facts={
            "minutes": options.minutes,
            "spent_seconds": work.budget.kept,
            "date": moment(),
            "machine": machine_facts(),
            "command": command,
            "config": work.experiment.plain(),
            "schedule": dataclasses.asdict(plan.schedule),
            "costs": {s.name: dataclasses.asdict(s.cost) for s in costs if s.cost is not None},
        },
    )


def _figures(results: Sequence[Mapping[str, Any]], rate: float | None) -> dict[str, Any]:
    """Return the chosen rate of a system and the means of its final runs."""
    return {
        "rate": rate,
        "steps": results[0]["steps"],
        "quality": statistics.fmean(r["quality"] for r in results),
        "train_quality": statistics.fmean(r["train_quality"] for r in results),
        "seconds_per_step": statistics.median(r["seconds_per_step"] for r in results),
        "by_seed": [r["quality"] for r in results],
        "routing": means([r["routing"] for r in results]),
    }


def _facts(figures: Mapping[str, Any], higher_is_better: bool) -> Facts:
    """Return the figures of a system, a larger quality being better."""
    sign = 1.0 if higher_is_better else -1.0
    quality, trained = sign * figures["quality"], sign * figures["train_quality"]
    return Facts(quality, trained, figures["seconds_per_step"], figures["routing"])


def configuration(options: VerdictOptions) -> tuple[Path, tuple[str, ...], tuple[str, ...]]:
    """Return the configuration's file, sentences on how the data were read, and what is wrong with the data.

    A configuration is taken as it is. For other data the apps are asked in turn, and the configuration of the first one
    that accepts them is written to ``config.yaml`` in the output folder.

    Raises:
        ValueError: data that no app knows, or that one knows and rejects.
    """
    if options.is_config:
        return options.data[0], (), ()
    columns = (options.exclude, options.time, options.user)
    first, *more = options.target or (None,)
    given = GivenData(options.data, first, options.folder / "data", options.kind, *columns, more_targets=tuple(more))
    made = config_of(given)
    path = options.folder / "config.yaml"
    with replacing(path) as file:
        yaml.safe_dump(dict(made.config), file, sort_keys=False)
    return path, made.notes, made.warnings
