"""The leaderboard as one HTML file: who leads each board, quality against cost, and every figure."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from apps.cli.configs import shipped
from apps.compare.suite.file import Suite
from apps.compare.suite.markdown import legend, not_run
from apps.compare.suite.standings import Standing, Standings
from apps.compare.table import shown_interval
from apps.report.page import (
    MOST_FIGURES,
    Code,
    Entry,
    Page,
    Part,
    Point,
    ScatterChart,
    Section,
    Table,
    Text,
    shown,
)


def leaderboard_page(suite: Suite, boards: Sequence[Standings], date: str) -> Page:
    """Return the page of a suite; ``date`` is when it was written, in ISO format."""
    return Page(
        title=suite.title,
        verdict=tuple(f"{b.board.name}: {b.sentence()}" for b in boards if b.ranked) or ("Nothing has been run yet.",),
        figures=_leaders(boards),
        sections=(
            *(_section(suite, board) for board in boards),
            Section("How to read it", (Text(tuple(legend(suite, boards))),)),
            Section(
                "How to repeat it",
                (
                    Code("Command", shlex.join(suite.command())),
                    Code("The suite file", shipped(Path(suite.path)).read_text(encoding="utf-8"), closed=True),
                ),
            ),
        ),
        kind="leaderboard",
        date=date,
        entries=tuple(_entry(board, row) for board in boards for row in board.ranked),
    )


def _leaders(boards: Sequence[Standings]) -> Table | None:
    """Return the best row of each board; None where nothing was run."""
    rows = []
    for board in boards:
        metric = board.metrics[0]
        for best in board.ranked[:1]:
            test = shown_interval(best.tests[metric], metric in board.shares)
            rows.append((board.board.name, best.title, board.heading(metric), test, f"{best.num_seeds}"))
    columns = ("board", "best", "metric", "test", "seeds")
    return Table("", columns, tuple(rows[:MOST_FIGURES])) if rows else None


def _section(suite: Suite, board: Standings) -> Section:
    headings, *lines = board.cells()
    about = [line for line in (board.board.about.strip(),) if line]
    left = [line.replace("`", "") for line in not_run(suite, board)]
    below = [*board.notes(), *left, *(f"Runs: {machine}." for machine in board.machines())]
    parts: list[Part] = [Text(tuple(about))] if about else []
    parts += _charts(board)
    parts.append(Table("", tuple(headings), tuple(map(tuple, lines)), sortable=True))
    parts += [Text(tuple(below))] if below else []
    return Section(board.board.name, tuple(parts))


def _charts(board: Standings) -> list[ScatterChart]:
    """Return the first metric against FLOPs and against training time, where they are known."""
    metric = board.metrics[0]
    factor = 100.0 if metric in board.shares else 1.0
    unit = next((row.figures["cost"]["unit"] for row in board.ranked if row.figures.get("cost")), "an example")
    charts = []
    for name, axis, costs in (
        ("FLOPs", f"MFLOPs {unit}, forward", [(row.cost("flops_per_example") or 0.0) / 1e6 for row in board.ranked]),
        ("training time", "training time of a run, s", [row.train_seconds or 0.0 for row in board.ranked]),
    ):
        points = []
        for row, cost in zip(board.ranked, costs, strict=True):
            test = row.tests[metric]
            if test is None or not cost:
                continue
            ends = (None, None) if test.half_width is None else (factor * test.low, factor * test.high)
            points.append(Point(row.title, cost, factor * test.mean, *ends))
        if not points:
            continue
        best = points[0]
        seen = f"The best mean is that of {best.label}, {best.y:.4g} at {shown(best.x)}; bars are 95 % intervals."
        spread = max(p.x for p in points) > 20 * min(p.x for p in points)
        title = f"{board.board.name}: quality against {name}"
        charts.append(ScatterChart(title, seen, axis, f"test {board.heading(metric)}", tuple(points), log_x=spread))
    return charts


def _entry(board: Standings, row: Standing) -> Entry:
    metric = board.metrics[0]
    test = row.tests[metric]
    assert test is not None
    flops = row.cost("flops_per_example")
    figures = {
        f"test {board.heading(metric)}": (100.0 if metric in board.shares else 1.0) * test.mean,
        "MFLOPs": None if flops is None else flops / 1e6,
        "parameters": row.cost("num_params"),
        "active parameters": row.cost("active_params"),
        "training, s": row.train_seconds,
    }
    name = f"{board.board.name}: {row.title}"
    return Entry(name, {name: value for name, value in figures.items() if value is not None})
