"""The leaderboard as one HTML file: who leads each board, quality against cost, and every figure."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from apps.cli.configs import shipped
from apps.compare.costs import FLOPS, SECONDS, Quality
from apps.compare.page import shown_interval
from apps.compare.suite.file import Suite
from apps.compare.suite.standings import Standings
from apps.report.page import MOST_FIGURES, Code, Page, Section, Table, Text
from apps.train.cost.kinds import MEANINGS


def leaderboard_page(suite: Suite, boards: Sequence[Standings], date: str) -> Page:
    """Return the page of a suite; ``date`` is when it was written, in ISO format."""
    return Page(
        title=suite.title,
        verdict=tuple(f"{b.board.name}: {b.sentence()}" for b in boards if b.ranked) or ("Nothing has been run yet.",),
        figures=_leaders(boards),
        sections=(
            Section("What it is", Text.if_any([suite.about.strip()])),
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
    left = not_run(suite, board)
    charts = _quality(board).charts({FLOPS: "FLOPs", SECONDS: "training time"}, f"{board.board.name}: quality")
    table = Table("", tuple(headings), tuple(map(tuple, lines)), sortable=True)
    below = Text.if_any([*board.notes(), *left, *(f"Runs: {machine}." for machine in board.machines())])
    return Section(board.board.name, (*Text.if_any([board.board.about.strip()]), *charts, table, *below))


def _quality(board: Standings) -> Quality:
    """Return the first metric of the rows with figures, and what they take."""
    metric = board.metrics[0]
    models = [(row.title, test, row.costs) for row in board.ranked if (test := row.tests[metric]) is not None]
    return Quality(f"test {board.heading(metric)}", metric in board.shares, board.higher_is_better, models)


def legend(suite: Suite, boards: Sequence[Standings]) -> list[str]:
    """Return sentences that say what the columns are."""
    kinds = {row.figures.get("kind") for board in boards for row in board.rows}
    meant = [f"{kind}: {meaning}" for kind, meaning in MEANINGS.items() if kind in kinds]
    return [
        *([f"What a model is, is derived from the model itself. {'; '.join(meant).capitalize()}."] if meant else []),
        f"Test figures are means over {suite.seeds} seeds ± half a 95 % interval (Student's t), of the weights of the "
        "last step, or of the averaged ones where a configuration averages. 'Best minus it' is paired by seed; its "
        "interval does not count that the best is chosen among the rows.",
        "Each model trains at the learning rate of its configuration, a baseline at that of the configuration that it "
        "belongs to; trees and linear models search their settings on validation data.",
        "FLOPs are those of one forward, without padding, products alone, two a multiply-add. Speeds and memory are of "
        "the first seed's model, or of a freshly drawn one where its weights are no longer kept, each measured alone, "
        "without reading data; the memory is above what the process held before the model was built. Training times "
        "are as recorded, whatever else the machine did.",
    ]


def not_run(suite: Suite, standings: Standings) -> list[str]:
    """Return a line with the command that does the runs of a board that are left; none where all are done."""
    missing = [row.title for row in standings.rows if row.state == "not run"]
    partly = [row.title for row in standings.rows if row.num_seeds and row.num_seeds + row.diverged < suite.seeds]
    if not missing and not partly:
        return []
    parts = [
        f"{words}: {'; '.join(names)}." for words, names in (("Not run", missing), ("Not all seeds", partly)) if names
    ]
    if len(missing) == len(standings.rows):
        parts = ["Not run."]
    board = standings.board
    command = shlex.join(suite.command("--boards", board.name))
    estimates = [
        row.entry.minutes * (suite.seeds - row.num_seeds - row.diverged)
        for row in standings.rows
        if row.entry.minutes and row.state != "left out"
    ]
    time = f" (about {duration(sum(estimates))})" if sum(estimates) else ""
    return [f"{' '.join(parts)} {command}{time}"]


def duration(minutes: float) -> str:
    """Return minutes as "40 min" or "3.2 h"."""
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"
