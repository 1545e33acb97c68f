"""The numbers of a comparison, computed from the results of its finished units."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from apps.compare.costs import Costs
from apps.compare.systems import SPARSE, TOLERANCE, System, claim, label
from apps.equal_cost.comparison import ExampleDifference
from apps.equal_cost.routers import PREFIX
from apps.report.intervals import Interval, mean_interval, paired_difference, quality_at, verdict
from apps.report.tables import is_share

Pair = tuple[Interval | None, Interval | None]
"""A system's quality, and the sparse model's minus it; None if there is none."""


@dataclass(frozen=True)
class Row:
    """One system's results.

    Attributes:
        system: the system, with its cost before training.
        rate: chosen learning rate; None for an estimator.
        rate_at_edge: True where a better rate may lie outside the tried ones.
        test: test quality over the seeds.
        difference: sparse minus this system, paired by seed; None for the sparse one.
        equal_time: validation quality at equal time over the seeds; None if a run had no validation by then.
        equal_time_difference: sparse minus this system at equal time.
        train_seconds: mean seconds of a final run.
        speed: measured speed and memory; empty if nothing was measured.
        routing: figures of the routing in the test, means over layers and seeds; empty without experts.
        tuning: result of the search of an estimator's settings; empty if there was none.
        further: other test metrics by name, each with its difference, sparse minus this system; None if one of the two
            does not report it.
    """

    system: System
    rate: float | None
    rate_at_edge: bool
    test: Interval
    difference: Interval | None
    equal_time: Interval | None
    equal_time_difference: Interval | None
    train_seconds: float
    speed: Mapping[str, Any]
    routing: Mapping[str, float] = field(default_factory=dict)
    tuning: Mapping[str, Any] = field(default_factory=dict)
    further: Mapping[str, Pair] = field(default_factory=dict)

    @property
    def costs(self) -> Costs:
        """Return its cost, with the FLOPs counted before the training, which ``moesaic fit`` shows too."""
        cost = self.system.cost
        return Costs(None if cost is None else asdict(cost), self.speed, self.train_seconds)

    @property
    def trained_costs(self) -> Costs:
        """Return its cost, with the FLOPs of an evaluation with the trained weights where they were measured."""
        costs, trained = self.costs, self.speed.get("cost")
        if not costs.counted or not trained:
            return costs
        return replace(costs, counted={**costs.counted, "flops_per_example": trained["flops_per_example"]})


@dataclass(frozen=True)
class ExamplePair:
    """The sparse model and another system, of one seed, on the same test examples.

    Attributes:
        system: name of the other system.
        seed: seed of both.
        differences: differences as the module computes them.
    """

    system: str
    seed: int
    differences: tuple[ExampleDifference, ...]


@dataclass(frozen=True)
class Summary:
    """The figures in the table.

    Attributes:
        rows: results of the sparse system, then of the trained baselines.
        left_out: baselines that were not trained; ``refused`` says why.
        metric: name of the test quality, such as "test/top1".
        higher_is_better: True where a larger test quality is better.
        percent: True where the quality is a share in 0..1, which is shown in percent.
        seeds: seeds of the final runs.
        equal_seconds: training time at which systems are compared, for each seed.
        clock: "steps" if time is steps times their measured seconds, or "recorded" if it is the time of each run.
        shares: names of the further metrics that are shown in percent.
        tasks: the metric of each task, if there are several.
        weights: description of the weights in the test.
        examples: comparisons of single seeds, example by example.
    """

    rows: tuple[Row, ...]
    left_out: tuple[System, ...]
    metric: str
    higher_is_better: bool
    percent: bool
    seeds: tuple[int, ...]
    equal_seconds: tuple[float, ...]
    clock: Literal["steps", "recorded"]
    shares: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    weights: str = "of the last step"
    examples: tuple[ExamplePair, ...] = ()

    @property
    def quality(self) -> str:
        """Return the name of the test quality without the split."""
        name = short_name(self.metric)
        return f"mean {name}" if self.tasks and name not in self.tasks else name

    @property
    def heading(self) -> str:
        """Return the label of the test quality on axes."""
        return f"test {self.quality}{', %' if self.percent else ''}"

    @property
    def unit(self) -> str:
        """Return the unit that the FLOPs are counted for, such as "an image"."""
        return next((row.system.cost.unit for row in self.rows if row.system.cost), "an example")

    def systems(self) -> list[Row]:
        """Return the rows of the sparse model and of other kinds of models."""
        return [row for row in self.rows if not row.system.name.startswith(PREFIX)]

    def routers(self) -> list[Row]:
        """Return the rows of the sparse model with other routers, the best first."""
        rows = [row for row in self.rows if row.system.name.startswith(PREFIX)]
        return sorted(rows, key=lambda row: row.test.mean, reverse=self.higher_is_better)

    def sentences(self) -> list[str]:
        """Return the verdict of the intervals on the test at equal steps, task by task, and of validation at equal
        time."""
        lines = []
        for row in self.systems():
            for task in self.tasks or (self.quality,):
                difference = row.further[task][1] if task in row.further else row.difference
                if difference is not None:
                    where = f"in {task} at this budget" if self.tasks else "at this budget"
                    percent = task in self.shares if task in row.further else self.percent
                    lines.append(sentence(row, difference, self, where, percent))
            if row.equal_time_difference is not None:
                where = "at equal training time, on validation data"
                where = f"in {self.quality} {where}" if self.tasks else where
                lines.append(sentence(row, row.equal_time_difference, self, where, self.percent))
        return lines

    def two_intervals(self) -> str:
        """Return sentences that tell intervals over seeds from those over test examples; empty without the latter."""
        over = next((d.over for pair in self.examples for d in pair.differences), None)
        if over is None:
            return ""
        return (
            "Two kinds of interval. Above, over training seeds: would both models, trained again, differ so? Below, "
            f"over the {over} of one seed: would these two trained models differ on other {over}? A difference may be "
            "significant below and not shown above."
        )

    def example_lines(self) -> list[str]:
        """Return a line for each difference over one seed's test examples."""
        shares = {*self.shares, *([self.quality] if self.percent else [])}
        return [example_line(pair, d, d.name in shares) for pair in self.examples for d in pair.differences]


@dataclass(frozen=True)
class Results:
    """The results of the units of a plan, by the systems' names.

    Attributes:
        finals: results of the final units, in the order of the seeds.
        rates: chosen learning rate, None for an estimator, and whether it is at the edge of those tried.
        searches: results of the search units.
        speeds: results of ``measure``.
        examples: test examples that each final unit kept.
        checkpoints: trained weights of the first seed, without estimators.
    """

    finals: Mapping[str, Sequence[Mapping[str, Any]]]
    rates: Mapping[str, tuple[float | None, bool]]
    searches: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    speeds: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    examples: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]] = field(default_factory=dict)
    checkpoints: Mapping[str, Path] = field(default_factory=dict)


def summarize(
    systems: Sequence[System],
    results: Results,
    seeds: Sequence[int],
    *,
    metric: str,
    higher_is_better: bool,
    further: Sequence[str] = (),
    tasks: Sequence[str] = (),
    average_last: int | None = None,
    examples: Sequence[ExamplePair] = (),
) -> Summary:
    """Return the summary of a comparison.

    Equal time is set seed by seed: it is the shortest training time of a system with that seed, so that the fastest is
    compared with all of its training and the others stop before the end of their schedule. Estimators have no steps
    that could be cut short and take no part. Runs may be hours apart, and the machine's load differs between them; so
    time is a run's steps times the median seconds of a step, measured with the systems taking turns. Where that was not
    measured, time is as recorded.

    Args:
        systems: all systems, the sparse one first.
        results: results of their units.
        seeds: seeds of the final units.
        metric: name of the test quality.
        higher_is_better: True where a larger quality is better.
        further: names, without the split, of more test metrics to show.
        tasks: the metrics of each task, if there are several; the tested one may be among them.
        average_last: number of epochs whose weights each run averaged; None for none.
        examples: comparisons of each system and seed, if the module compares examples.
    """
    finals, rates, speeds = results.finals, results.rates, results.speeds
    trained = [s for s in systems if s.name in finals]
    tests: dict[str, list[float] | None] = {s.name: [float(r["test_quality"]) for r in finals[s.name]] for s in trained}
    clock: Literal["steps", "recorded"] = "steps"
    in_steps = [s for s in trained if finals[s.name][0]["steps"] is not None]
    if not all("seconds_per_step" in speeds.get(s.name, {}) for s in in_steps):
        clock = "recorded"

    def timed(s: System, step: int, seconds: float) -> float:
        return step * float(speeds[s.name]["seconds_per_step"]) if clock == "steps" else seconds

    def end(s: System, i: int) -> float:
        return timed(s, finals[s.name][i]["steps"], finals[s.name][i]["train_seconds"])

    equal = [min(end(s, i) for s in in_steps) for i in range(len(seeds))]
    at_time: dict[str, list[float] | None] = {}
    for s in in_steps:
        reached = [
            quality_at([(timed(s, step, seconds), q) for step, seconds, q in result["curve"]], equal[i])
            for i, result in enumerate(finals[s.name])
        ]
        at_time[s.name] = None if None in reached else [float(q) for q in reached if q is not None]
    others = {name: {s.name: _values(name, finals[s.name]) for s in trained} for name in further}
    rows = []
    for s in trained:
        test, difference = _pair(s.name, tests)
        equal_time, equal_time_difference = _pair(s.name, at_time)
        assert test is not None
        rows.append(
            Row(
                system=s,
                rate=rates[s.name][0],
                rate_at_edge=rates[s.name][1],
                test=test,
                difference=difference,
                equal_time=equal_time,
                equal_time_difference=equal_time_difference,
                train_seconds=sum(float(r["train_seconds"]) for r in finals[s.name]) / len(seeds),
                speed=speeds.get(s.name, {}),
                tuning=results.searches[s.name][0] if s.tunes and results.searches.get(s.name) else {},
                routing=means([r.get("routing", {}) for r in finals[s.name]]),
                further={name: _pair(s.name, values) for name, values in others.items()},
            )
        )
    return Summary(
        rows=tuple(rows),
        left_out=tuple(s for s in systems if s.name not in finals),
        metric=metric,
        higher_is_better=higher_is_better,
        percent=higher_is_better and is_share(metric, (values or () for values in tests.values())),
        seeds=tuple(seeds),
        equal_seconds=tuple(equal),
        clock=clock,
        shares=tuple(name for name, own in others.items() if is_share(name, (v or () for v in own.values()))),
        tasks=tuple(tasks),
        weights="of the last step" if average_last is None else f"averaged over the last {average_last} epochs' ends",
        examples=tuple(examples),
    )


def _pair(system: str, values: Mapping[str, Sequence[float] | None]) -> Pair:
    """Return the quality of a system over the seeds, and how the sparse one differs; ``values`` are by system."""
    own = values.get(system)
    if not own:
        return None, None
    sparse = None if system == SPARSE else values[SPARSE]
    return mean_interval(own), paired_difference(sparse, own) if sparse else None


def _values(name: str, results: Sequence[Mapping[str, Any]]) -> list[float] | None:
    """Return a test metric of each seed; None if it is not reported."""
    values = [r.get("test", {}).get(f"test/{name}") for r in results]
    return None if any(v is None for v in values) else [float(v) for v in values if v is not None]


def means(figures: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the mean of each figure that all of them have."""
    names = [name for name in figures[0] if all(name in own for own in figures)]
    return {name: sum(own[name] for own in figures) / len(figures) for name in names}


def sentence(row: Row, difference: Interval, summary: Summary, where: str, percent: bool) -> str:
    """Return a description in words of the difference to one baseline."""
    against, unit = f"Against {row.system.title}", " points" if percent else ""
    other = "dense" if row.system.name.startswith("dense") else "it"
    own = summary.rows[0].system.title
    shown = f"{own} minus {other} {number(difference.mean, percent, True, difference.half_width)}{unit}"
    n, half = difference.count, difference.half_width
    if half is None:
        why = f"{shown}; one seed gives no interval"
    elif half == 0:
        why = f"{shown} with each of {n} seeds: equal values do not estimate the spread over seeds"
    else:
        low, high = (number(end, percent, True, half) for end in (difference.low, difference.high))
        holds = "excludes" if difference.excludes_zero else "holds"
        why = f"{shown}; 95 % interval over {n} seeds {low} to {high}{unit}, which {holds} 0"
    outcome = verdict(difference, summary.higher_is_better)
    return f"{against}: {f'{own} ' if difference.excludes_zero else ''}{outcome} {where} ({why})."


def example_line(pair: ExamplePair, d: ExampleDifference, percent: bool) -> str:
    """Return in words the sparse model's difference to another one on the test examples of one seed."""
    significance = "significant" if d.p < 0.05 else "not significant"
    shown, low, high = d.texts(percent)
    return (
        f"Against {label(pair.system)}, seed {pair.seed}: {d.name} difference {shown}{' points' if percent else ''}, "
        f"95 % interval over the {d.over} {low} to {high}, p = {d.p:.3f}: {significance} over these {d.over} "
        f"({d.method})."
    )


def notes(summary: Summary) -> list[str]:
    """Return notes on the kind and cost of each system, on those left out, and on rates at the edge."""
    lines = []
    for row in summary.systems():
        s = row.system
        what = claim(s.name)
        if what is not None and s.flops_ratio is not None:
            ratio = s.replaced_ratio if what == "flops" else s.params_ratio
            unit = "FLOPs" if what == "flops" else "parameters"
            lines.append(
                f"{s.title}: {s.note}; measured, its replaced blocks have {ratio:.3f} x the sparse model's "
                f"{unit} (the rule is within {TOLERANCE:.0%}), the whole model {s.flops_ratio:.3f} x its FLOPs."
            )
        elif s.note:
            lines.append(f"{s.title}: {s.note}{f'; {tuned(row.tuning)}' if row.tuning else ''}.")
    lines += [f"{s.title}: left out: {s.refused}." for s in summary.left_out]
    lines += _drops(summary)
    edge = [f"{row.system.title} ({row.rate:g})" for row in summary.rows if row.rate_at_edge]
    if edge:
        lines.append(
            f"Best at the edge of the learning rates tried: {'; '.join(edge)}. A better one may lie outside "
            "(--learning_rates)."
        )
    return lines


def tuned(search: Mapping[str, Any]) -> str:
    """Return the result of a search of settings in words, such as "tuned for 2.0 min, 7 of 22 settings"."""
    done, total, seconds = len(search["tried"]), search["num_settings"], search["seconds"]
    duration = f"{seconds:.1f} s" if seconds < 60 else f"{seconds / 60:.1f} min"
    text = f"tuned for {duration}, {done} of {total} settings"
    if done < total:
        text += f" (--baseline_minutes {search['minutes']:g} ended the search; the best of these is taken)"
    return text


def _drops(summary: Summary) -> list[str]:
    """Return a line for each trained model that computes other FLOPs than were counted before."""
    lines = []
    for row in summary.rows:
        before, after = row.system.cost, row.speed.get("cost")
        if before and after and before.replaced_flops_per_example:
            ratio = after["replaced_flops_per_example"] / before.replaced_flops_per_example
            if abs(ratio - 1) > TOLERANCE:
                why = "a router that decides how many experts a token takes, or a capacity that drops tokens"
                lines.append(
                    f"{row.system.title}: trained, its replaced blocks compute {ratio:.3f} x the FLOPs counted "
                    f"before ({why})."
                )
    return lines


def short_name(metric: str) -> str:
    """Return a test metric's name without the split: "top1" of "test/top1", "acc" of "test_acc"."""
    return re.sub(r"^test[/_.-]", "", metric)


def number(value: float, percent: bool, signed: bool = False, half_width: float | None = None) -> str:
    """Return a quality as text without unit, in percent or to two digits of its half width."""
    sign = "+" if signed else ""
    value = value + 0.0  # no -0.00
    if percent:
        return f"{100 * value:{sign}.2f}"
    if not half_width or not math.isfinite(half_width):
        return f"{value:{sign}.4g}"
    return f"{value:{sign}.{min(max(1 - math.floor(math.log10(half_width)), 0), 9)}f}"
