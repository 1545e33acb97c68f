"""The leaderboard as a Markdown page, which is kept with the source."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from apps.compare.suite.file import Suite
from apps.compare.suite.standings import Standings
from apps.report.tables import markdown_table
from apps.train.cost.kinds import MEANINGS


def markdown(suite: Suite, boards: Sequence[Standings]) -> str:
    """Return the leaderboard. It depends on the suite file and on the figures alone, and on no machine."""
    lines = [f"# {suite.title}", ""]
    if suite.about:
        lines += [suite.about.strip(), ""]
    lines += [f"`{shlex.join(suite.command())}` writes this page and goes on where it was stopped.", ""]
    lines += [f"- {line}" for line in legend(suite, boards)]
    for standings in boards:
        board = standings.board
        lines += ["", f"## {board.name}", ""]
        if board.about:
            lines += [board.about.strip(), ""]
        first, *rest = standings.cells()
        lines += markdown_table(first, rest, left=2)
        below = [line for line in (standings.sentence(), *standings.notes(), *not_run(suite, standings)) if line]
        lines += ["", *(f"- {line}" for line in below)] if below else []
        machines = standings.machines()
        lines += [f"- Runs: {'; '.join(machines)}."] if machines else []
    return "\n".join(lines) + "\n"


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
    command = f"`{shlex.join(suite.command('--boards', board.name))}`"
    how = f" {board.missing.strip()}" if board.missing and missing else ""
    estimates = [
        row.entry.minutes * (suite.seeds - row.num_seeds - row.diverged)
        for row in standings.rows
        if row.entry.minutes and row.state != "left out"
    ]
    time = f" (about {duration(sum(estimates))})" if sum(estimates) else ""
    return [f"{' '.join(parts)}{how} {command}{time}"]


def duration(minutes: float) -> str:
    """Return minutes as "40 min" or "3.2 h"."""
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"
