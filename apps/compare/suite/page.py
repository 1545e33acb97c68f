"""The leaderboard as one HTML file: who leads each board, quality against cost, and every figure."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from apps.cli.configs import shipped
from apps.compare.costs import FLOPS, SECONDS, Quality
from apps.compare.suite.file import Suite
from apps.compare.suite.markdown import legend, not_run
from apps.compare.suite.standings import Standings
from apps.compare.table import shown_interval
from apps.report.page import MOST_FIGURES, Code, Page, Section, Table, Text


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
        entries=tuple(entry for board in boards for entry in _quality(board).entries(f"{board.board.name}: ")),
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
    left = [line.replace("`", "") for line in not_run(suite, board)]
    charts = _quality(board).charts({FLOPS: "FLOPs", SECONDS: "training time"}, f"{board.board.name}: quality")
    table = Table("", tuple(headings), tuple(map(tuple, lines)), sortable=True)
    below = Text.if_any([*board.notes(), *left, *(f"Runs: {machine}." for machine in board.machines())])
    return Section(board.board.name, (*Text.if_any([board.board.about.strip()]), *charts, table, *below))


def _quality(board: Standings) -> Quality:
    """Return the first metric of the rows with figures, and what they take."""
    metric = board.metrics[0]
    models = [(row.title, test, row.costs) for row in board.ranked if (test := row.tests[metric]) is not None]
    return Quality(f"test {board.heading(metric)}", metric in board.shares, board.higher_is_better, models)
