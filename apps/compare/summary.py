"""The numbers of a comparison from its finished units: pure, from plain values to plain values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from apps.compare.stats import paired_difference, quality_at, verdict
from apps.compare.systems import SPARSE, TOLERANCE, System, claim, label
from apps.equal_cost.comparable import ExampleDifference
from apps.equal_cost.routers import PREFIX
from apps.report.intervals import Interval, mean_interval

_NOT_SHARES = ("loss", "ece", "error", "mse", "mae", "perplexity", "bits", "bleu", "chrf")
"""Words in the names of metrics that are no share of 1, whatever their values: a poor BLEU lies in 0..1 as well."""


@dataclass(frozen=True)
class Row:
    """One system's results.

    Attributes:
        system: which, with its cost before training.
        rate: the chosen learning rate; None for an estimator.
        rate_at_edge: a better one may lie outside the tried ones.
        test: test quality over the seeds.
        difference: sparse minus this system, paired by seed; None for the sparse one.
        equal_time: validation quality at equal time over the seeds; None where one had not been validated by then.
        train_seconds: mean of a final run.
        speed: what was measured of speed and memory; empty where nothing was.
        routing: how the experts were used in the test, by figure; means over layers and seeds, empty without experts.
        tuning: what the search of an estimator's settings came to; empty where there was none.
        further: by name, test metrics beside the quality and the differences, the sparse one minus this; None where a
            system does not report it, and for the difference of the sparse one.
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
    further: Mapping[str, tuple[Interval | None, Interval | None]] = field(default_factory=dict)


@dataclass(frozen=True)
class ExamplePair:
    """The sparse model and another system, of one seed, on the same test examples.

    Attributes:
        system: the other one's name.
        seed: of both.
        differences: as the module compares them.
    """

    system: str
    seed: int
    differences: tuple[ExampleDifference, ...]


@dataclass(frozen=True)
class Summary:
    """Everything the table shows.

    Attributes:
        rows: the sparse system first, then the trained baselines.
        left_out: baselines that were not trained; ``refused`` says why.
        metric: name of the test quality, such as "test/top1".
        higher_is_better: of it.
        percent: it is a share in 0..1, and shown in percent.
        shares: names of the further metrics that are.
        seeds: of the final runs.
        equal_seconds: per seed, the training time at which systems are compared.
        clock: what time is: "steps" times the measured seconds of one, or as "recorded" in each run.
        weights: which the test was read with.
        examples: tests of single seeds, example by example.
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
    weights: str = "of the last step"
    examples: tuple[ExamplePair, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def systems(self) -> list[Row]:
        """Return the rows that are the sparse model or another kind of model."""
        return [row for row in self.rows if not row.system.name.startswith(PREFIX)]

    def routers(self) -> list[Row]:
        """Return the rows that are the sparse model with another router, the best first."""
        rows = [row for row in self.rows if row.system.name.startswith(PREFIX)]
        return sorted(rows, key=lambda row: row.test.mean, reverse=self.higher_is_better)

    def sentences(self) -> list[str]:
        """Return what the intervals allow to be said of the test at equal steps, then of validation at equal time."""
        lines = []
        for row in self.systems():
            if row.difference is not None:
                lines.append(sentence(row, row.difference, self, "at this budget"))
            if row.equal_time_difference is not None:
                lines.append(
                    sentence(row, row.equal_time_difference, self, "at equal training time, on validation data")
                )
        return lines

    def two_intervals(self) -> str:
        """Return a sentence that tells intervals over seeds from those over test examples; empty without the latter."""
        over = next((d.over for pair in self.examples for d in pair.differences), None)
        if over is None:
            return ""
        return (
            "Two kinds of interval. Above, over training seeds: would both models, trained again, differ so? Below, "
            f"over the {over} of one seed: would these two trained models differ on other {over}? A difference may be "
            "significant below and not shown above."
        )

    def example_lines(self, parts: bool = True) -> list[str]:
        """Return what each seed's test examples say by themselves; ``parts``: also of parts of them."""
        return [
            example_line(pair, difference)
            for pair in self.examples
            for difference in pair.differences
            if parts or not difference.is_part
        ]


@dataclass(frozen=True)
class Results:
    """What the units of a plan came to, by the systems' names.

    Attributes:
        finals: results of the final units, in the order of the seeds.
        rates: the chosen learning rate, None for an estimator, and whether it is at the edge of those tried.
        searches: results of the search units.
        speeds: what ``measure`` returned.
        examples: what each final unit kept of its test examples.
        checkpoints: the trained weights of the first seed; without estimators.
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
    average_last: int | None = None,
    examples: Sequence[ExamplePair] = (),
) -> Summary:
    """Put the units together.

    Equal time is set seed by seed: the shortest training time among the systems with that seed, so that each has
    reached it and the fastest is compared with all of its training. The others stop before the end of their schedule.
    Estimators, which have no steps that could be cut short, take no part in it.
    Runs follow one another, perhaps for hours, and the machine's load differs between them; so time is a run's steps
    times the median seconds of a step, measured with the systems taking turns; not measured, it is as recorded.

    Args:
        systems: all of them, the sparse one first.
        results: what their units came to.
        seeds: of the final units.
        metric: name of the test quality.
        higher_is_better: of it.
        further: names, without the split, of more test metrics to show.
        average_last: epochs whose weights each run averaged; None: none.
        examples: of each other system and seed, where the module compares examples.
    """
    finals, rates, speeds = results.finals, results.rates, results.speeds
    trained = [s for s in systems if s.name in finals]
    tests = {s.name: [float(r["test_quality"]) for r in finals[s.name]] for s in trained}
    clock: Literal["steps", "recorded"] = "steps"
    in_steps = [s for s in trained if finals[s.name][0]["steps"] is not None]
    if not all("seconds_per_step" in speeds.get(s.name, {}) for s in in_steps):
        clock = "recorded"

    def timed(s: System, step: int, seconds: float) -> float:
        return step * float(speeds[s.name]["seconds_per_step"]) if clock == "steps" else seconds

    def end(s: System, i: int) -> float:
        return timed(s, finals[s.name][i]["steps"], finals[s.name][i]["train_seconds"])

    equal = [min(end(s, i) for s in in_steps) for i in range(len(seeds))]
    at_time: dict[str, list[float] | None] = {s.name: None for s in trained}
    for s in in_steps:
        reached = [
            quality_at([(timed(s, step, seconds), q) for step, seconds, q in result["curve"]], equal[i])
            for i, result in enumerate(finals[s.name])
        ]
        at_time[s.name] = None if any(q is None for q in reached) else [float(q) for q in reached if q is not None]
    rows = []
    sparse_at_time = at_time[SPARSE]
    for s in trained:
        own_at_time = at_time[s.name]
        other = s.name != SPARSE
        rows.append(
            Row(
                system=s,
                rate=rates[s.name][0],
                rate_at_edge=rates[s.name][1],
                test=mean_interval(tests[s.name]),
                difference=paired_difference(tests[SPARSE], tests[s.name]) if other else None,
                equal_time=None if own_at_time is None else mean_interval(own_at_time),
                equal_time_difference=paired_difference(sparse_at_time, own_at_time)
                if other and sparse_at_time and own_at_time
                else None,
                train_seconds=sum(float(r["train_seconds"]) for r in finals[s.name]) / len(seeds),
                speed=speeds.get(s.name, {}),
                tuning=results.searches[s.name][0] if s.tunes and results.searches.get(s.name) else {},
                routing=_means([r.get("routing", {}) for r in finals[s.name]]),
                further={name: _further(name, finals[SPARSE], finals[s.name] if other else None) for name in further},
            )
        )
    values = [v for name in tests for v in tests[name]]
    return Summary(
        rows=tuple(rows),
        left_out=tuple(s for s in systems if s.name not in finals),
        metric=metric,
        higher_is_better=higher_is_better,
        percent=higher_is_better and _may_be_share(metric) and all(0 <= v <= 1 for v in values),
        seeds=tuple(seeds),
        equal_seconds=tuple(equal),
        clock=clock,
        shares=tuple(name for name in further if _is_share(name, finals)),
        weights="of the last step" if average_last is None else f"averaged over the last {average_last} epochs' ends",
        examples=tuple(examples),
    )


def _further(
    name: str, sparse: Sequence[Mapping[str, Any]], other: Sequence[Mapping[str, Any]] | None
) -> tuple[Interval | None, Interval | None]:
    """Return a test metric of a system (None: of the sparse one), and how the sparse one differs."""
    of_sparse, of_other = (None if r is None else _values(name, r) for r in (sparse, other))
    if other is None:
        return (None if of_sparse is None else mean_interval(of_sparse)), None
    if of_other is None:
        return None, None
    return mean_interval(of_other), None if of_sparse is None else paired_difference(of_sparse, of_other)


def _values(name: str, results: Sequence[Mapping[str, Any]]) -> list[float] | None:
    """Return a test metric of each seed; None where it is not reported."""
    values = [r.get("test", {}).get(f"test/{name}") for r in results]
    return None if any(v is None for v in values) else [float(v) for v in values if v is not None]


def _is_share(name: str, finals: Mapping[str, Sequence[Mapping[str, Any]]]) -> bool:
    """Whether a metric is shown in percent: a share in 0..1 that is no loss and no error."""
    if not _may_be_share(name):
        return False
    values = [v for results in finals.values() for v in _values(name, results) or ()]
    return all(0 <= v <= 1 or math.isnan(v) for v in values)


def _may_be_share(name: str) -> bool:
    return not any(word in _NOT_SHARES for word in name.rpartition("/")[2].split("_"))


def _means(figures: Sequence[Mapping[str, float]]) -> dict[str, float]:
    names = [name for name in figures[0] if all(name in own for own in figures)]
    return {name: sum(own[name] for own in figures) / len(figures) for name in names}


def sentence(row: Row, difference: Interval, summary: Summary, where: str) -> str:
    """Return what a difference to one baseline allows to be said."""
    against, unit = f"Against {label(row.system.name)}", " points" if summary.percent else ""
    other = "dense" if row.system.name.startswith("dense") else "it"
    shown = f"sparse minus {other} {number(difference.mean, summary.percent, True, difference.half_width)}{unit}"
    n = difference.count
    if difference.half_width is None:
        return f"{against}: no difference shown {where} ({shown}; one seed gives no interval)."
    if difference.half_width == 0:
        every = f"{shown} with each of {n} seeds, which do not tell how far others would spread"
        return f"{against}: no difference shown {where} ({every})."
    low, high = (
        number(difference.low, summary.percent, True, difference.half_width),
        number(difference.high, summary.percent, True, difference.half_width),
    )
    interval = f"95 % interval over {n} seeds {low} to {high}{unit}"
    outcome = verdict(difference, summary.higher_is_better)
    if outcome == "no difference shown":
        return f"{against}: no difference shown {where} ({shown}; {interval}, which holds 0)."
    return f"{against}: sparse {outcome} {where} ({shown}; {interval}, which excludes 0)."


def example_line(pair: ExamplePair, difference: ExampleDifference) -> str:
    """Return in words a difference on the examples of one seed, whose sign is the sparse model's minus the other's."""
    d = difference
    significance = "significant" if d.p < 0.05 else "not significant"
    return (
        f"Against {label(pair.system)}, seed {pair.seed}: {d.name} difference {d.difference:+.2f}, 95 % interval over "
        f"the {d.over} {d.low:+.2f} to {d.high:+.2f}, p = {d.p:.3f}: {significance} over these {d.over} ({d.method})."
    )


def notes(summary: Summary) -> list[str]:
    """Return what a reader must know: left-out baselines, ratios, rates at the edge, limits of a measure."""
    lines = []
    for row in summary.systems():
        s = row.system
        what = claim(s.name)
        if what is not None and s.flops_ratio is not None:
            ratio = s.replaced_ratio if what == "flops" else s.params_ratio
            unit = "FLOPs" if what == "flops" else "parameters"
            lines.append(
                f"{label(s.name)}: {s.note}; measured, its replaced blocks have {ratio:.3f} x the sparse model's "
                f"{unit} (the rule is within {TOLERANCE:.0%}), the whole model {s.flops_ratio:.3f} x its FLOPs."
            )
        elif s.note:
            lines.append(f"{label(s.name)}: {s.note}{f'; {tuned(row.tuning)}' if row.tuning else ''}.")
    lines += [f"{label(s.name)}: left out: {s.refused}." for s in summary.left_out]
    lines += _drops(summary)
    edge = [f"{label(row.system.name)} ({row.rate:g})" for row in summary.rows if row.rate_at_edge]
    if edge:
        lines.append(
            f"Best at the edge of the learning rates tried: {'; '.join(edge)}. A better one may lie outside "
            "(--learning_rates)."
        )
    return lines


def tuned(search: Mapping[str, Any]) -> str:
    """Say what a search of settings came to: "tuned for 2.0 min, 7 of 22 settings"."""
    done, total = len(search["tried"]), search["num_settings"]
    text = f"tuned for {_duration(search['seconds'])}, {done} of {total} settings"
    if done < total:
        text += f" (--baseline_minutes {search['minutes']:g} ended the search; the best of these is taken)"
    return text


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else f"{seconds / 60:.1f} min"


def _drops(summary: Summary) -> list[str]:
    """Say where the trained model computes less or more than counted before."""
    lines = []
    for row in summary.rows:
        before, after = row.system.cost, row.speed.get("cost")
        if before and after and before.replaced_flops_per_example:
            ratio = after["replaced_flops_per_example"] / before.replaced_flops_per_example
            if abs(ratio - 1) > TOLERANCE:
                why = "a router that decides how many experts a token takes, or a capacity that drops tokens"
                lines.append(
                    f"{label(row.system.name)}: trained, its replaced blocks compute {ratio:.3f} x the FLOPs counted "
                    f"before ({why})."
                )
    return lines


def flops(row: Row) -> float | None:
    """Return the FLOPs an example, as counted before the training; ``moesaic fit`` says the same of the network."""
    return row.system.cost.flops_per_example if row.system.cost else None


def flops_trained(row: Row) -> float | None:
    """Return the FLOPs an example that an evaluation computes with the trained weights; None: not measured."""
    cost = row.speed.get("cost")
    return float(cost["flops_per_example"]) if cost else None


def flops_unit(summary: Summary) -> str:
    """Return what the FLOPs are of, such as "an image"."""
    return next((row.system.cost.unit for row in summary.rows if row.system.cost), "an example")


def number(value: float, percent: bool, signed: bool = False, half_width: float | None = None) -> str:
    """Return a quality as it is shown, without unit: in percent where it is a share, else to two digits of its ±."""
    sign = "+" if signed else ""
    value = value + 0.0  # no -0.00
    if percent:
        return f"{100 * value:{sign}.2f}"
    if not half_width or not math.isfinite(half_width):
        return f"{value:{sign}.4g}"
    return f"{value:{sign}.{min(max(1 - math.floor(math.log10(half_width)), 0), 9)}f}"
