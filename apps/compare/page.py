"""The report of a comparison: verdict, quality against cost, training, every figure, and how to repeat it."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from apps.base.messages import counted
from apps.compare import table
from apps.compare.summary import Results, Row, Summary, flops, flops_trained, flops_unit, notes
from apps.compare.systems import label
from apps.report.page import (
    Code,
    Entry,
    Line,
    LineChart,
    Page,
    Part,
    Point,
    ScatterChart,
    Section,
    Table,
    Text,
    how_to_repeat,
    shown,
)
from apps.report.page.training import training_section


def comparison_page(
    title: str,
    summary: Summary,
    results: Results,
    numbers: Mapping[str, Any],
    facts: Sequence[str] = (),
    examples: str = "",
    logs: Mapping[str, Path] | None = None,
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
        logs: ``metrics.csv`` of the first seed's training, by the name of the system.
        more: sections of the app on the sparse model, such as what its experts are used for.
    """
    logs = logs or {}
    names = {row.system.name: row.system.title for row in summary.rows}
    courses = tuple(training_section(path, names[name]) for name, path in logs.items() if name in names)
    return Page(
        title=title,
        verdict=tuple(summary.sentences()) or tuple(_best_router(summary)),
        figures=table.figures(summary),
        sections=(
            Section("Quality against cost", tuple(cost_charts(summary))),
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
        entries=tuple(_entry(row, summary) for row in summary.rows),
    )


def cost_charts(summary: Summary) -> list[ScatterChart]:
    """Return test quality against FLOPs, parameters, training time and latency, for the costs that are known."""
    unit, rows = flops_unit(summary), summary.rows
    costs: dict[str, tuple[str, list[float | None]]] = {
        "active FLOPs": (f"MFLOPs {unit}, forward", [_mflops(row) for row in rows]),
        "parameters": ("parameters", [_size(row, "num_params") for row in rows]),
        "active parameters": ("active parameters", [_size(row, "active_params") for row in rows]),
        "training time": ("training time of a run, s", [r.train_seconds for r in rows]),
        "latency": (f"ms {unit}, in batches", [_latency(r) for r in rows]),
    }
    charts = []
    for name, (axis, values) in costs.items():
        known = [(row, value) for row, value in zip(rows, values, strict=True) if value]
        if not known:
            continue
        points = tuple(_point(row, value, summary.percent) for row, value in known)
        spread = max(p.x for p in points) > 20 * min(p.x for p in points)
        best = max(points, key=lambda p: p.y if summary.higher_is_better else -p.y)
        seen = f"The best mean is that of {best.label}, {best.y:.4g} at {shown(best.x)}; bars are 95 % intervals."
        charts.append(ScatterChart(f"Quality against {name}", seen, axis, _quality(summary), points, log_x=spread))
    return charts


def learning_curves(summary: Summary, results: Results) -> list[LineChart]:
    """Return validation quality over steps and over seconds of training, a line a seed."""
    factor = 100.0 if summary.percent else 1.0
    quality = f"validation {summary.quality}{', %' if summary.percent else ''}"
    lines: dict[str, list[Line]] = {"step": [], "s": []}
    for row in summary.rows:
        if row.system.cost is None:
            continue
        for seed, result in zip(summary.seeds, results.finals[row.system.name], strict=True):
            steps, seconds, values = zip(*result["curve"], strict=True)
            y = tuple(factor * float(v) for v in values)
            for axis, x in (("step", steps), ("s", seconds)):
                lines[axis].append(Line(row.system.title, tuple(map(float, x)), y, f"seed {seed}"))
    if not lines["step"]:
        return []
    last: dict[str, list[float]] = {}
    for line in lines["step"]:
        last.setdefault(line.label, []).append(line.y[-1])
    ends = "; ".join(f"{name} ends at {statistics.mean(own):.4g}" for name, own in last.items())
    return [
        LineChart("Over steps", f"A line a seed: {ends} on average.", "optimizer step", quality, tuple(lines["step"])),
        LineChart("Over time", f"Seconds of training; {ends} on average.", "s of training", quality, tuple(lines["s"])),
    ]


def _searches(summary: Summary, results: Results) -> list[Part]:
    """Return the validation quality of each learning rate that was tried; empty where there was no search."""
    factor = 100.0 if summary.percent else 1.0
    lines = []
    for row in summary.rows:
        tried = results.searches.get(row.system.name, ())
        points = [(r["unit"]["rate"], r["quality"]) for r in tried if "unit" in r and r.get("quality") is not None]
        points = [(rate, value) for rate, value in points if rate is not None]
        if points:
            rates, values = zip(*sorted(points), strict=True)
            lines.append(Line(row.system.title, rates, tuple(factor * v for v in values)))
    if not lines:
        return []
    quality = f"validation {summary.quality}{', %' if summary.percent else ''}"
    seen = "; ".join(f"{r.system.title} takes {r.rate:g}" for r in summary.rows if r.rate is not None)
    return [LineChart("Quality by learning rate", f"{seen}.", "learning rate", quality, tuple(lines), log_x=True)]


def _example_section(summary: Summary, examples: str) -> Section:
    lines = tuple(filter(None, (summary.two_intervals(), *summary.example_lines())))
    parts: list[Part] = [Text(lines)] if lines else []
    if examples:
        parts.append(Code("Test examples, as each model answers them", examples))
    return Section("Test examples", tuple(parts))


def _tables(summary: Summary) -> list[Table]:
    return [
        Table("", tuple(rows[0]), tuple(tuple(row) for row in rows[1:]), sortable=rows[0][0] == "router")
        for rows in table.tables(summary)
    ]


def _best_router(summary: Summary) -> list[str]:
    routers = summary.routers()
    if not routers:
        return []
    best = routers[0]
    half = best.test.half_width
    spread = "" if half is None else f" ± {100 * half if summary.percent else half:.2g}"
    value = 100 * best.test.mean if summary.percent else best.test.mean
    return [
        f"Best router at equal active FLOPs: {label(best.system.name)}, {_quality(summary)} {value:.4g}{spread} over "
        f"{counted(len(summary.seeds), 'seed')}."
    ]


def _entry(row: Row, summary: Summary) -> Entry:
    factor = 100.0 if summary.percent else 1.0
    figures: dict[str, float | None] = {
        _quality(summary): factor * row.test.mean,
        "MFLOPs": _mflops(row),
        "parameters": _size(row, "num_params"),
        "active parameters": _size(row, "active_params"),
        "training, s": row.train_seconds,
        "ms an example": _latency(row),
    }
    return Entry(row.system.title, {name: float(value) for name, value in figures.items() if value is not None})


def _point(row: Row, x: float, percent: bool) -> Point:
    factor, test = (100.0 if percent else 1.0), row.test
    ends = (None, None) if test.half_width is None else (factor * test.low, factor * test.high)
    return Point(row.system.title, float(x), factor * test.mean, *ends)


def _quality(summary: Summary) -> str:
    return f"test {summary.quality}{', %' if summary.percent else ''}"


def _latency(row: Row) -> float | None:
    """Return the milliseconds of an example in an evaluation; None where no speed was measured."""
    rate = row.speed.get("inference_examples_per_second")
    return 1000 / rate if rate else None


def _mflops(row: Row) -> float | None:
    """Return the FLOPs of an evaluation with the trained weights, else those counted before, in millions."""
    value = flops_trained(row) or flops(row)
    return None if value is None else value / 1e6


def _size(row: Row, field: str) -> float | None:
    return None if row.system.cost is None else float(getattr(row.system.cost, field))
