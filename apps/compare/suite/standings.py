"""The results of the finished runs of a suite: small JSON files that are kept with the source, the rows of a board with
their intervals, the best first, and the leaderboard as a page.

Figures count for the configuration that they were made with: figures of another one under the same name are ignored.
"""

from __future__ import annotations

import shlex
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apps.base.files import read_json, write_json
from apps.cli.configs import shipped
from apps.compare.costs import FLOPS, MEMORY, NONE, SECONDS, SIZES, SPEEDS, Costs, Quality
from apps.compare.page import shown_interval
from apps.compare.suite.file import Board, Entry, Suite, slug
from apps.compare.systems import label
from apps.registry import of_today
from apps.report.intervals import Interval, mean_interval, paired_difference
from apps.report.page import Code, Page, Section, Table, Text
from apps.report.tables import is_share
from apps.runner.runner import differences
from apps.train.cost.kinds import DENSE_GATED, MEANINGS, SPARSE

_DIGITS = 7


class Figures:
    """The figures of a suite's finished runs.

    Args:
        folder: folder of the files.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, board: str) -> Path:
        return self.folder / f"{slug(board)}.json"

    def row(self, entry: Entry) -> dict[str, Any]:
        """Return the figures of a row; empty if there are none of its configuration.

        The keys are those that the queue has given to ``add``, and "runs": the figures of each run, by its seed.

        Raises:
            ValueError: the file is not one of figures.
        """
        row = self._saved(entry.board).get(entry.name)
        if row is None or self.changes(entry):
            return {"runs": {}}
        return {**row, "runs": {int(seed): run for seed, run in row["runs"].items()}}

    def changes(self, entry: Entry) -> list[str]:
        """Return how the configuration differs from the one of the saved figures; empty if it does not."""
        row = self._saved(entry.board).get(entry.name)
        return [] if row is None else differences(of_today(_identity(row, entry)), _identity_now(entry))

    def add(self, entry: Entry, **facts: Any) -> None:
        """Save facts of a row; figures of another configuration under its name go."""
        row = {**self.row(entry), **facts}
        saved = {**self._saved(entry.board), entry.name: _plain({**_identity_now(entry), **row})}
        write_json(self.path(entry.board), {"board": entry.board, "rows": saved})

    def add_run(self, entry: Entry, seed: int, run: Mapping[str, Any]) -> None:
        """Save the figures of a finished run."""
        self.add(entry, runs=dict(sorted({**self.row(entry)["runs"], seed: run}.items())))

    def _saved(self, board: str) -> dict[str, Any]:
        path = self.path(board)
        saved = read_json(path)
        if saved is None:
            return {}
        rows = saved.get("rows") if isinstance(saved, dict) else None
        if not isinstance(rows, dict) or not all(
            isinstance(r, dict) and isinstance(r.get("runs"), dict) for r in rows.values()
        ):
            raise ValueError(f"{path} holds no figures of a suite: delete it to have them made again")
        return rows


def _identity_now(entry: Entry) -> dict[str, Any]:
    return {**entry.identity, **({"baseline_minutes": entry.baseline_minutes} if entry.baseline else {})}


def _identity(row: Mapping[str, Any], entry: Entry) -> dict[str, Any]:
    """Return the part of a saved row that says what its figures depend on; only a search depends on minutes."""
    identity = {name: row.get(name) for name in _identity_now(entry)}
    if entry.baseline and not row.get("tunes"):
        identity["baseline_minutes"] = entry.baseline_minutes
    return identity


def _plain(value: Any) -> Any:
    """Return plain values with numbers to so many digits that a file stays small."""
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}")
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


_COSTS = (FLOPS, *SIZES, *SPEEDS, MEMORY, SECONDS)
_BRIEF = (FLOPS, SIZES[0], SECONDS)


@dataclass(frozen=True)
class Standing:
    """One row of a board.

    Attributes:
        entry: the trained entry.
        figures: its saved figures.
        tests: test metrics over the seeds that are finished; None: it does not report the metric, or was not run.
        behind: the best row minus this one in the first metric, paired by seed; None for the best and without runs.
        diverged: number of seeds with which the training diverged.
    """

    entry: Entry
    figures: Mapping[str, Any]
    tests: Mapping[str, Interval | None]
    behind: Interval | None = None
    diverged: int = 0

    @property
    def title(self) -> str:
        """Return what tables call it; a baseline by the words of its name."""
        if self.entry.baseline is None:
            return self.entry.name
        return self.entry.name.removesuffix(self.entry.baseline) + label(self.entry.baseline)

    @property
    def num_seeds(self) -> int:
        """Return the number of seeds with figures."""
        return len(self.figures["runs"]) - self.diverged

    @property
    def state(self) -> str:
        """Return why there are no figures; "" if there are some."""
        if self.num_seeds:
            return ""
        if self.figures.get("refused"):
            return "left out"
        return "diverged" if self.diverged else "not run"

    @property
    def costs(self) -> Costs:
        """Return its cost, without the figures that were not measured."""
        seconds = [run["train_seconds"] for run in self.figures["runs"].values() if "train_seconds" in run]
        mean = statistics.fmean(seconds) if seconds else None
        return Costs(self.figures.get("cost"), self.figures.get("speed") or {}, mean)


@dataclass(frozen=True)
class Standings:
    """A board with its rows.

    Attributes:
        board: the board.
        metrics: names of the test metrics, the first of which ranks.
        higher_is_better: True where a larger first metric is better.
        shares: names of the metrics that are shown in percent.
        rows: the rows with figures, the best first, then the others in the order of the file.
        num_seeds: number of seeds of a finished row.
    """

    board: Board
    metrics: tuple[str, ...]
    higher_is_better: bool
    shares: frozenset[str]
    rows: tuple[Standing, ...]
    num_seeds: int

    @property
    def ranked(self) -> list[Standing]:
        """Return the rows with a figure in the first metric, the best first."""
        return [row for row in self.rows if row.tests[self.metrics[0]] is not None]

    def heading(self, metric: str) -> str:
        return f"{metric}, %" if metric in self.shares else metric

    def sentence(self) -> str:
        """Return who leads, and whether the lead over the next row is shown; "" without figures."""
        ranked, metric = self.ranked, self.metrics[0]
        if not ranked:
            return ""
        percent = metric in self.shares
        best = shown_interval(ranked[0].tests[metric], percent)
        lead = f"{ranked[0].title} leads with {metric} {best}{' %' if percent else ''}"
        if len(ranked) < 2:
            return f"{lead}."
        gap, other = ranked[1].behind, ranked[1].title
        if gap is None:
            return f"{lead}; it and {other} have no seed in common."
        shown = f"{shown_interval(gap, percent, signed=True)}{' points' if percent else ''}"
        if gap.half_width:
            sure = "significant" if gap.excludes_zero else "not significant"
        else:
            sure = "one seed" if gap.half_width is None else "no spread over seeds"
        return f"{lead}, {shown} compared with {other} ({sure})."

    def cells(self, brief: bool = False) -> list[list[str]]:
        """Return the table: headings, then one line per row.

        The seeds have a column if rows differ in their number. With ``brief=True``, one column has all and active
        parameters, and speed and memory are left out.
        """
        unit = next((row.costs.unit for row in self.rows if row.costs.unit), "an example")
        costs = {name: name for name in (_BRIEF if brief else _COSTS)}
        costs[FLOPS] = f"{FLOPS} per {unit.split(' ', 1)[-1]}"
        if brief:
            costs[SIZES[0]] = "parameters (active)"
        seeds = len({row.num_seeds for row in self.rows}) > 1
        headings = [
            "model",
            "kind",
            *map(self.heading, self.metrics),
            f"best minus it, {'points' if self.metrics[0] in self.shares else self.metrics[0]}",
            *costs.values(),
            *(["seeds"] if seeds else []),
        ]
        return [headings, *(self._line(row, costs, brief, seeds) for row in self.rows)]

    def _line(self, row: Standing, costs: Iterable[str], brief: bool, seeds: bool) -> list[str]:
        tests = [shown_interval(row.tests[metric], metric in self.shares) for metric in self.metrics]
        if row.state:
            tests[0] = row.state
        return [
            row.title,
            row.figures.get("kind") or NONE,
            *tests,
            shown_interval(row.behind, self.metrics[0] in self.shares),
            *(_sizes(row.costs) if brief and name == SIZES[0] else row.costs.cell(name) for name in costs),
            *([f"{row.num_seeds} of {self.num_seeds}"] if seeds else []),
        ]

    def notes(self) -> list[str]:
        """Return lines on rows without figures, or with fewer than the others."""
        diverged = f"of {self.num_seeds} seeds."
        return [
            *(f"{row.title}: left out: {row.figures['refused']}." for row in self.rows if row.figures.get("refused")),
            *(f"{row.title}: diverged with {row.diverged} {diverged}" for row in self.rows if row.diverged),
        ]

    def machines(self) -> list[str]:
        """Return the machines, versions and days of the runs, each once."""
        return sorted({run["machine"] for row in self.rows for run in row.figures["runs"].values()})


def _sizes(costs: Costs) -> str:
    """Return all parameters, and the active ones in parentheses if they are fewer."""
    total, active = map(costs.cell, SIZES)
    return total if active in (total, NONE) else f"{total} ({active})"


def standings(board: Board, suite: Suite, figures: Figures) -> Standings:
    """Return a board with what its finished runs have shown."""
    rows = {entry.name: _of_seeds(figures.row(entry), suite.seeds_of(entry)) for entry in board.entries}
    known = [row for row in rows.values() if "monitor" in row]
    metrics = board.metrics or (known[0]["monitor"] if known else "test quality",)
    higher = not board.lower_is_better
    if not board.metrics and known:
        higher = bool(known[0]["higher_is_better"])
    tests = {
        name: {seed: run["test"] for seed, run in row["runs"].items() if "test" in run} for name, row in rows.items()
    }

    def values(name: str, metric: str) -> dict[int, float]:
        return {seed: test[metric] for seed, test in tests[name].items() if metric in test}

    by_seed = {name: own for name in rows if (own := values(name, metrics[0]))}
    order = sorted(by_seed, key=lambda name: statistics.fmean(by_seed[name].values()), reverse=higher)

    def made(entry: Entry) -> Standing:
        name, behind = entry.name, None
        by_metric = {metric: list(values(name, metric).values()) for metric in metrics}
        # A row has the metrics that all of its runs have.
        means = {m: mean_interval(v) if v and len(v) == len(tests[name]) else None for m, v in by_metric.items()}
        if name in order[1:] and (seeds := [seed for seed in by_seed[order[0]] if seed in by_seed[name]]):
            behind = paired_difference(*([by_seed[n][seed] for seed in seeds] for n in (order[0], name)))
        return Standing(entry, rows[name], means, behind, sum("diverged" in run for run in rows[name]["runs"].values()))

    made_rows = {entry.name: made(entry) for entry in board.entries}
    every = {metric: [values(name, metric).values() for name in rows] for metric in metrics}
    shares = frozenset(metric for metric, own in every.items() if any(own) and is_share(metric, own))
    ranked = [made_rows.pop(name) for name in order]
    return Standings(board, tuple(metrics), higher, shares, (*ranked, *made_rows.values()), suite.seeds)


def _of_seeds(row: dict[str, Any], seeds: Sequence[int]) -> dict[str, Any]:
    return {**row, "runs": {seed: run for seed, run in row["runs"].items() if seed in seeds}}


def leaderboard_page(suite: Suite, boards: Sequence[Standings], date: str, brief: bool = False) -> Page:
    """Return the page of a suite.

    Args:
        suite: the suite.
        boards: its boards.
        date: when the page was written, in ISO format.
        brief: its tables have fewer columns (``Standings.cells``).
    """
    return Page(
        title=suite.title,
        verdict=tuple(f"{b.board.name}: {b.sentence()}" for b in boards if b.ranked) or ("Nothing has been run yet.",),
        sections=(
            Section("What it is", Text.if_any([suite.about.strip()])),
            *overall(boards),
            *(_section(suite, board, brief) for board in boards),
            Section("How to read it", (Text(tuple(legend(suite, boards, brief))),)),
            Section(
                "How to repeat it",
                (
                    Code("Command", shlex.join(suite.command())),
                    *Text.if_any([f"{suite.figures_folder} also has speed and memory."] if brief else []),
                    Code("The suite file", shipped(Path(suite.path)).read_text(encoding="utf-8"), closed=True),
                ),
            ),
        ),
        kind="leaderboard",
        date=date,
        entries=tuple(entry for board in boards for entry in _quality(board).entries(f"{board.board.name}: ")),
    )


def overall(boards: Sequence[Standings]) -> list[Section]:
    """Return ranks and gaps over the boards with figures of all rows; none for fewer than three, or of other rows.

    A rank is that of the mean over seeds, equal means sharing theirs. The gap is the best row's score minus its own,
    relative to the best row's distance to the worst: 0 is the best of a board and 1 the worst.
    """
    done = [board for board in boards if board.ranked and len(board.ranked) == len(board.rows)]
    names = {tuple(sorted(row.title for row in board.rows)) for board in done}
    if len(done) < 3 or len(names) > 1 or len(next(iter(names))) < 3:
        return []
    ranks: dict[str, list[float]] = {row.title: [] for row in done[0].rows}
    gaps: dict[str, list[float]] = {name: [] for name in ranks}
    for board in done:
        scores = {row.title: _mean(row.tests[board.metrics[0]]) for row in board.rows}
        best, worst = (pick(scores.values()) for pick in ((max, min) if board.higher_is_better else (min, max)))
        for name, score in scores.items():
            better = sum((other > score) == board.higher_is_better and other != score for other in scores.values())
            equal = sum(other == score for other in scores.values())
            ranks[name].append(better + (equal + 1) / 2)
            gaps[name].append((best - score) / (best - worst) if best != worst else 0.0)
    lines = [
        (
            name,
            shown_interval(mean_interval(ranks[name]), False),
            str(sum(rank < 2 for rank in ranks[name])),
            shown_interval(mean_interval(gaps[name]), False),
        )
        for name in sorted(ranks, key=lambda name: statistics.fmean(ranks[name]))
    ]
    head = ("model", "mean rank", "boards led", "mean gap (0: best, 1: worst)")
    text = f"Over {len(done)} boards; ± is the 95 % confidence interval over boards, which are no random draw."
    return [Section("All boards", (Table("", head, tuple(lines), sortable=True), Text((text,))))]


def _mean(interval: Interval | None) -> float:
    assert interval is not None
    return interval.mean


def _section(suite: Suite, board: Standings, brief: bool) -> Section:
    headings, *lines = board.cells(brief)
    left = not_run(suite, board)
    charts = _quality(board).charts({FLOPS: "FLOPs", SECONDS: "training time"}, f"{board.board.name}: quality")
    table = Table("", tuple(headings), tuple(map(tuple, lines)), sortable=True)
    below = Text.if_any([*board.notes(), *left])
    return Section(board.board.name, (*Text.if_any([board.board.about.strip()]), *charts, table, *below))


def _quality(board: Standings) -> Quality:
    """Return the first metric of the rows with figures, and their cost."""
    metric = board.metrics[0]
    models = [(row.title, test, row.costs) for row in board.ranked if (test := row.tests[metric]) is not None]
    return Quality(f"test {board.heading(metric)}", metric in board.shares, board.higher_is_better, models)


def legend(suite: Suite, boards: Sequence[Standings], brief: bool = False) -> list[str]:
    """Return sentences that describe the columns, and a line of the runs."""
    kinds = {row.figures.get("kind") for board in boards for row in board.rows}
    meant = [f"{kind}: {MEANINGS[kind]}" for kind in (SPARSE, DENSE_GATED) if kind in kinds]
    measured = "" if brief else "Speeds and memory are measured alone, without reading data. "
    return [
        *([f"Kinds, read from the model itself. {'; '.join(meant).capitalize()}."] if meant else []),
        f"± is the 95 % confidence interval over up to {suite.seeds} seeds (Student's t). Models are tested with the "
        "weights of the last step, averaged if the configuration averages. 'Best minus it' is paired by seed, and "
        "'significant' does not count that the best is chosen among the rows.",
        "Models train at the learning rate of their configuration; trees and linear models search their settings on "
        "validation data.",
        f"FLOPs are one forward's matmuls without padding, two per multiply-add. {measured}Training times are as "
        "recorded, whatever else the machine did.",
        *([f"Runs: {machines}."] if (machines := _runs(boards)) else []),
    ]


def _runs(boards: Sequence[Standings]) -> str:
    """Return the machines of all runs, each once with its days."""
    days: dict[str, list[str]] = {}
    for machine in sorted({machine for board in boards for machine in board.machines()}):
        name, _, day = machine.rpartition(", ")
        days.setdefault(name, []).append(day)
    return "; ".join(", ".join([name, *own]) for name, own in days.items())


def not_run(suite: Suite, standings: Standings) -> list[str]:
    """Return a line with the command that does the runs of a board that are left; none where all are done."""
    missing = [row.title for row in standings.rows if row.state == "not run"]
    partly = [row.title for row in standings.rows if row.num_seeds and row.num_seeds + row.diverged < suite.seeds]
    if len(partly) == len(standings.rows) and len({row.num_seeds for row in standings.rows}) == 1:
        partly = [f"all rows have {standings.rows[0].num_seeds} of {suite.seeds}"]
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
