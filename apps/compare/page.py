"""The report of a comparison: verdict, quality against cost, training, every figure, and how to repeat it."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from apps.base.messages import counted
from apps.compare import table
from apps.compare.costs import FLOPS, LATENCY, SECONDS, SIZES, Quality
from apps.compare.summary import Results, Row, Summary, notes
from apps.report.page import (
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

_COSTS = {FLOPS: "active FLOPs", **{name: name for name in SIZES}, SECONDS: "training time", LATENCY: "latency"}
"""What headings call the costs that quality is drawn against."""


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
        figures=table.figures(summary),
        sections=(
            Section("Quality against cost", quality.charts(_COSTS)),
            Section("Learning curves", tuple(learning_curves(summary, results))),
            *more,
            _example_section(summary, examples),
            Section("Training of the first seed", sections=courses),
            Section("Search of the learning rate", tuple(_searches(summary, results))),
            Section("Every figure", (*_tables(summary), Text((*notes(summary), *table.legend(summary), *facts)))),
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
    """Return validation quality over steps and over seconds of training, a line a seed."""
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
    """Return the validation quality of each learning rate that was tried; empty where there was no search."""
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


def _tables(summary: Summary) -> list[Table]:
    return [
        Table("", tuple(rows[0]), tuple(tuple(row) for row in rows[1:]), sortable=rows[0][0] == "router")
        for rows in table.tables(summary)
    ]


def _best_router(summary: Summary) -> list[str]:
    routers = summary.routers()
    if not routers:
        return []
    best = table.shown_interval(routers[0].test, summary.percent)
    seeds = counted(len(summary.seeds), "seed")
    return [f"Best router at equal active FLOPs: {routers[0].system.title}, {summary.heading} {best} over {seeds}."]
