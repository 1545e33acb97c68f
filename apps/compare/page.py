"""The report of a comparison: verdict, quality against cost, training, every figure, and how to repeat it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import yaml

from apps.base.messages import counted
from apps.compare.costs import FLOPS, LATENCY, MEMORY, NONE, SECONDS, SIZES, SPEEDS, Quality
from apps.compare.summary import Pair, Results, Row, Summary, notes, number
from apps.report.intervals import Interval
from apps.report.page import (
    MOST_FIGURES,
    Code,
    Line,
    LineChart,
    Page,
    Part,
    ScatterChart,
    Section,
    Table,
    Text,
    how_to_repeat,
)
from apps.report.page.training import training_section
from apps.train.watch.logs import METRICS

Quantity = tuple[str, Callable[[Row], str]]
"""A quantity's title, and how it is shown of one system."""

_ON_SCREEN = (0, 1, 2, 4, 5, 8)
"""Columns of the routers' table that fit 80 characters; the page has them all."""

_CLOCKS = {
    "steps": "steps times the median seconds a step of the speed measurement, in which the systems take turns",
    "recorded": "as recorded in each run, whatever else the machine did",
}


def cells(summary: Summary) -> list[list[str]]:
    """Return the table: a heading line, then a line a quantity, systems in columns."""
    rows = summary.systems()
    own = rows[0].system.title
    test, further, at_time = _qualities(summary, own)
    lines: list[Quantity] = [
        *(*test, *further, *at_time),
        ("learning rate", _rate),
        ("settings tried", lambda r: f"{len(r.tuning['tried'])} of {r.tuning['num_settings']}" if r.tuning else NONE),
        *map(_cost, SIZES),
        _flops(summary),
        (f"  x {own}, replaced", lambda r: _shown(r.system.replaced_ratio, ".3f")),
        (f"  x {own}, whole model", lambda r: _shown(r.system.flops_ratio, ".3f")),
        *_computed("  computed once trained", rows),
        *map(_cost, (*SPEEDS, MEMORY, SECONDS)),
    ]
    return _columns(lines, rows)


def router_cells(summary: Summary) -> list[list[str]]:
    """Return the table of routers: a heading, then a line a router, the sparse model's own first; empty without any."""
    if not summary.routers():
        return []
    rows = [*summary.systems()[:1], *summary.routers()]
    test, further, _ = _qualities(summary)
    lines: list[Quantity] = [
        ("router", lambda r: "the config's" if r.difference is None else r.system.title),
        *test,
        ("learning rate", _rate),
        ("load imbalance", lambda r: _shown(r.routing.get("load_imbalance"), ".2f")),
        ("dropped, %", lambda r: f"{100 * r.routing['drop_rate']:.1f}" if "drop_rate" in r.routing else NONE),
        _cost(SIZES[1]),
        _flops(summary),
        *map(_cost, SPEEDS),
        *further,
        *_computed("MFLOPs computed once trained", rows),
    ]
    return [[title for title, _ in lines], *([show(row) for _, show in lines] for row in rows)]


def figures(summary: Summary) -> Table | None:
    """Return at most ten lines of figures: systems in columns, or the best routers; None without another model."""
    rows = summary.systems()
    if len(rows) < 2:
        table = [[line[i] for i in _ON_SCREEN] for line in router_cells(summary)]
    else:
        test, further, at_time = _qualities(summary, rows[0].system.title)
        costs = (*map(_cost, SIZES), _flops(summary), *map(_cost, (*SPEEDS, SECONDS)))
        table = _columns([*test, *at_time, *costs, *further], rows)
    return Table("", tuple(table[0]), tuple(map(tuple, table[1 : 1 + MOST_FIGURES]))) if table else None


def _columns(lines: Sequence[Quantity], rows: Sequence[Row]) -> list[list[str]]:
    """Return the headings and the lines that have a value, systems in columns."""
    table = [[title, *(show(row) for row in rows)] for title, show in lines]
    return [["", *(row.system.title for row in rows)], *(x for x in table if any(cell != NONE for cell in x[1:]))]


def _qualities(summary: Summary, own: str = "") -> tuple[list[Quantity], list[Quantity], list[Quantity]]:
    """Return the lines of the test quality, of the further metrics and of validation at equal time; ``own`` is as for
    ``_compared``."""
    name, share = summary.quality, summary.percent
    seconds = sum(summary.equal_seconds) / len(summary.equal_seconds)
    time = f"{seconds:.1f} s" if seconds < 120 else f"{seconds / 60:.1f} min"

    def of(metric: str) -> list[Quantity]:
        return _compared(f"test {metric}", metric in summary.shares, lambda row: row.further[metric], own)

    return (
        _compared(f"test {name}", share, lambda r: (r.test, r.difference), own),
        [line for metric in summary.rows[0].further for line in of(metric)],
        _compared(f"val. {name} at {time}", share, lambda r: (r.equal_time, r.equal_time_difference), own),
    )


def _compared(title: str, share: bool, pair: Callable[[Row], Pair], own: str = "") -> list[Quantity]:
    """Return a line for a quality and one for a difference: the model called ``own`` minus a system; without ``own``,
    a router minus the configured one."""

    def difference(row: Row) -> str:
        value = pair(row)[1]
        return shown_interval(value.negated() if value and not own else value, share, signed=True)

    percent, points = (", %", ", points") if share else ("", "")
    minus = f"  {own} minus it" if own else "minus the config's"
    return [(f"{title}{percent}", lambda row: shown_interval(pair(row)[0], share)), (f"{minus}{points}", difference)]


def _shown(value: float | None, form: str) -> str:
    return NONE if value is None else format(value, form)


def _cost(name: str) -> Quantity:
    return name, lambda row: row.costs.cell(name)


def _flops(summary: Summary) -> Quantity:
    return f"{FLOPS} {summary.unit}", lambda row: row.costs.cell(FLOPS)


def _computed(title: str, rows: Sequence[Row]) -> list[Quantity]:
    """Return the line of the FLOPs once trained, where these are others than were counted before."""
    return [(title, lambda row: row.trained_costs.cell(FLOPS))] if any(map(_differs, rows)) else []


def _differs(row: Row) -> bool:
    """Return whether a trained model computes other FLOPs than were counted before, by more than rounding shows."""
    before, after = (costs.figures.get(FLOPS, 0.0) for costs in (row.costs, row.trained_costs))
    return abs(after - before) > 0.005 * before


def _rate(row: Row) -> str:
    return NONE if row.rate is None else f"{row.rate:g}{' (edge)' if row.rate_at_edge else ''}"


def shown_interval(value: Interval | None, percent: bool, signed: bool = False) -> str:
    """Return a mean ± half of its interval as text, to the digits that the interval allows; a dash for none."""
    if value is None:
        return NONE
    shown = number(value.mean, percent, signed, value.half_width)
    if value.half_width is None:
        return shown
    return f"{shown} ± {number(value.half_width, percent, half_width=value.half_width)}"


def legend(summary: Summary) -> list[str]:
    """Return sentences that say how each line was measured."""
    n = len(summary.seeds)
    lines = [
        f"Means of {counted(n, 'seed')}, ± half a 95 % interval (Student's t); differences are paired by "
        f"seed. Test data was read once a seed, with the weights {summary.weights}.",
        f"FLOPs: of one forward of {summary.unit} (moesaic fit gives the same figure, for models of the suite), "
        "in the first batch of the validation, without padding, products alone, two a multiply-add, counted by "
        f"torch.utils.flop_counter. 'x {summary.rows[0].system.title}' is over that model's: those of the blocks that "
        "differ, then those of the whole model.",
    ]
    if len(summary.systems()) > 1:
        lines.append(
            "Equal time: the last validation by the time the fastest system had ended its training; the slower ones "
            f"are cut short of their schedule. Time is {_CLOCKS[summary.clock]}."
            + (" Models without steps take no part." if any(r.system.cost is None for r in summary.rows) else "")
        )
    if summary.routers():
        lines.append(
            "Routers: the config's model with another router, its experts as wide as gives equal active FLOPs. Load "
            "imbalance is the most loaded expert over the mean, in the test; means over layers and seeds."
        )
    if any(row.speed for row in summary.rows):
        lines.append(
            "Speed: median of rounds in which the systems take turns, after a warm-up round, without reading data. "
            "Peak memory: in training, of a process of its own, above what it held before the model was built."
        )
    return lines


def tables(summary: Summary) -> list[Table]:
    """Return the tables of a comparison: systems in columns, routers in lines."""
    systems = cells(summary) if len(summary.systems()) > 1 else []
    shown = [rows for rows in (systems, router_cells(summary)) if rows]
    return [Table("", tuple(t[0]), tuple(map(tuple, t[1:])), sortable=t[0][0] == "router") for t in shown]


_COSTS = {FLOPS: "active FLOPs", **{name: name for name in SIZES}, SECONDS: "training time", LATENCY: "latency"}
"""What headings call the costs that quality is plotted against."""


def comparison_page(
    title: str,
    summary: Summary,
    results: Results,
    numbers: Mapping[str, Any],
    facts: Sequence[str] = (),
    examples: str = "",
    more: Sequence[Section] = (),
) -> Page:
    """Return the report of a comparison.

    Args:
        title: its heading.
        summary: figures of the comparison.
        results: results of its units.
        numbers: contents of ``results.json``: command, date, machine and configuration.
        facts: lines that say how the comparison was made.
        examples: test examples as each system answers them; empty for none.
        more: sections of the app on the sparse model, such as what its experts are used for.
    """
    quality = _quality(summary)
    names = {row.system.name: row.system.title for row in summary.rows}
    courses = tuple(
        training_section(checkpoint.with_name(METRICS), names[name])
        for name, checkpoint in results.checkpoints.items()
        if name in names
    )
    return Page(
        title=title,
        verdict=tuple(summary.sentences()) or tuple(_best_router(summary)),
        figures=figures(summary),
        sections=(
            Section("Quality against cost", quality.charts(_COSTS)),
            Section("Learning curves", tuple(learning_curves(summary, results))),
            *more,
            _example_section(summary, examples),
            Section("Training of the first seed", sections=courses),
            Section("Search of the learning rate", tuple(_searches(summary, results))),
            Section("Every figure", (*tables(summary), Text((*notes(summary), *legend(summary), *facts)))),
            how_to_repeat(numbers["command"], yaml.safe_dump(numbers["config"], sort_keys=False), numbers["machine"]),
        ),
        kind="comparison",
        date=numbers["date"],
        entries=quality.entries(),
    )


def cost_charts(summary: Summary) -> tuple[ScatterChart, ...]:
    """Return test quality against each known cost, FLOPs first."""
    return _quality(summary).charts(_COSTS)


def _quality(summary: Summary) -> Quality:
    models = [(row.system.title, row.test, row.trained_costs) for row in summary.rows]
    return Quality(summary.heading, summary.percent, summary.higher_is_better, models)


def learning_curves(summary: Summary, results: Results) -> list[LineChart]:
    """Return validation quality over steps and over seconds of training, one line per seed."""
    lines: tuple[list[Line], list[Line]] = ([], [])
    last: dict[str, list[float]] = {}
    for row in (row for row in summary.rows if row.system.cost):
        for seed, result in zip(summary.seeds, results.finals[row.system.name], strict=True):
            *places, values = zip(*result["curve"], strict=True)
            for own, x in zip(lines, places, strict=True):
                own.append(_line(row, x, values, summary, f"seed {seed}"))
            last.setdefault(row.system.title, []).append(lines[0][-1].y[-1])
    if not last:
        return []
    ends = "; ".join(f"{name} ends at {statistics.mean(own):.4g}" for name, own in last.items())
    quality, (by_step, by_time) = _validation(summary), lines
    return [
        LineChart("Over steps", f"A line a seed: {ends} on average.", "optimizer step", quality, tuple(by_step)),
        LineChart("Over time", f"Seconds of training; {ends} on average.", "s of training", quality, tuple(by_time)),
    ]


def _searches(summary: Summary, results: Results) -> list[Part]:
    """Return the validation quality of each learning rate that was tried; empty if there was no search."""
    lines = []
    for row in summary.rows:
        tried = [r for r in results.searches.get(row.system.name, ()) if r.get("quality") is not None]
        points = sorted((r["unit"]["rate"], r["quality"]) for r in tried if r["unit"]["rate"] is not None)
        if points:
            rates, values = zip(*points, strict=True)
            lines.append(_line(row, rates, values, summary))
    if not lines:
        return []
    seen = "; ".join(f"{r.system.title} takes {r.rate:g}" for r in summary.rows if r.rate is not None)
    quality = _validation(summary)
    return [LineChart("Quality by learning rate", f"{seen}.", "learning rate", quality, tuple(lines), log_x=True)]


def _line(row: Row, x: Sequence[float], quality: Sequence[float], summary: Summary, part: str = "") -> Line:
    factor = 100.0 if summary.percent else 1.0
    return Line(row.system.title, tuple(map(float, x)), tuple(factor * float(q) for q in quality), part)


def _validation(summary: Summary) -> str:
    return summary.heading.replace("test", "validation", 1)


def _example_section(summary: Summary, examples: str) -> Section:
    read = (Code("Test examples, as each model answers them", examples),) if examples else ()
    return Section("Test examples", (*Text.if_any((summary.two_intervals(), *summary.example_lines())), *read))


def _best_router(summary: Summary) -> list[str]:
    routers = summary.routers()
    if not routers:
        return []
    best = shown_interval(routers[0].test, summary.percent)
    seeds = counted(len(summary.seeds), "seed")
    return [f"Best router at equal active FLOPs: {routers[0].system.title}, {summary.heading} {best} over {seeds}."]
