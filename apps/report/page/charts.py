"""Charts of a page as plain values, each with its numbers as a table; ``vega`` renders them.

Every chart has a ``summary``: its content in a sentence, for readers who cannot see it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MOST_ROWS = 60
"""Rows of the table below a chart; a longer one keeps rows at equal steps."""


@dataclass(frozen=True)
class Point:
    """A point of a ``ScatterChart``.

    Attributes:
        label: name of its series, shown in the legend.
        x, y: its place.
        low, high: ends of the interval of ``y``; None draws none.
        left, right: ends of the interval of ``x``; None draws none.
        note: text next to it.
    """

    label: str
    x: float
    y: float
    low: float | None = None
    high: float | None = None
    left: float | None = None
    right: float | None = None
    note: str = ""


@dataclass(frozen=True)
class _Axes:
    """A chart with two axes.

    Attributes:
        title, summary: heading and text alternative.
        x_title, y_title: names of the axes, with units.
    """

    title: str
    summary: str
    x_title: str
    y_title: str


@dataclass(frozen=True)
class ScatterChart(_Axes):
    """Points with error bars, such as quality against cost.

    Attributes:
        points: the points, at least one.
        log_x: the horizontal axis is logarithmic; all x are above 0.
        is_reversed: less is better, and is plotted higher.
        front: points of a line of steps behind the points, by rising x.
        curves: lines behind the points, in the colors of the points of their labels.
        log_y: the vertical axis is logarithmic; all y are above 0.
    """

    points: tuple[Point, ...]
    log_x: bool = False
    is_reversed: bool = False
    front: tuple[tuple[float, float], ...] = ()
    curves: tuple[Line, ...] = ()
    log_y: bool = False

    def headings(self) -> tuple[str, ...]:
        return ("", self.x_title, self.y_title, "95 % interval")

    def cells(self) -> list[tuple[str, ...]]:
        """Return the numbers, a row a point."""
        return [
            (
                f"{p.label}, {p.note}" if p.note else p.label,
                _number(p.x),
                _number(p.y),
                "–" if p.low is None else f"{_number(p.low)} to {_number(p.high)}",
            )
            for p in self.points
        ]


@dataclass(frozen=True)
class Line:
    """A line of a ``LineChart``.

    Attributes:
        label: name of the line in the legend; lines of one label have one color.
        x, y: its points, of one length, by rising x; NaN in ``y`` leaves a gap.
        part: tells lines of one label apart, such as "seed 1"; empty for a single one.
        notes: text above each point.

    Raises:
        ValueError: x and y differ in length.
    """

    label: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    part: str = ""
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(self.x) != len(self.y):
            raise ValueError(f"line {self.label!r} has {len(self.x)} x for {len(self.y)} y")

    @property
    def name(self) -> str:
        return f"{self.label}, {self.part}" if self.part else self.label

    def thinned(self, most: int) -> Line:
        """Return the line by the means of ``most`` parts of equal length, or as it is if it has no more points."""
        if len(self.x) <= most:
            return self
        ends = [round(i * len(self.x) / most) for i in range(most + 1)]
        parts = list(itertools.pairwise(ends))
        x, y = (tuple(math.fsum(v[a:b]) / (b - a) for a, b in parts) for v in (self.x, self.y))
        return Line(self.label, x, y, self.part)


@dataclass(frozen=True)
class LineChart(_Axes):
    """Lines over a common axis, such as learning curves.

    Attributes:
        lines: the lines, at least one.
        diagonal: draw where y equals x as well, as in a calibration curve.
        log_x, log_y: the axis is logarithmic; all its values are above 0.
    """

    lines: tuple[Line, ...]
    diagonal: bool = False
    log_x: bool = False
    log_y: bool = False

    def headings(self) -> tuple[str, ...]:
        return (self.x_title, *(line.name for line in self.lines))

    def cells(self) -> list[tuple[str, ...]]:
        """Return the numbers, a row for each x and a column for each line."""
        by_line = [dict(zip(line.x, line.y, strict=True)) for line in self.lines]
        places = sorted({x for line in self.lines for x in line.x})
        return [(_number(x), *(_number(own.get(x)) for own in by_line)) for x in places]


@dataclass(frozen=True)
class BarChart(_Axes):
    """Bars side by side, such as the load of each expert.

    Attributes:
        names: names of the bars' places.
        series: a value for each place, by the name of the series.
        line: value at which a line crosses the chart, such as an even share; None for none.

    Raises:
        ValueError: a series of another length than the names.
    """

    names: tuple[str, ...]
    series: dict[str, tuple[float, ...]]
    line: float | None = None

    def __post_init__(self) -> None:
        for label, values in self.series.items():
            if len(values) != len(self.names):
                raise ValueError(f"bars {label!r}: {len(values)} values for {len(self.names)} names")

    def headings(self) -> tuple[str, ...]:
        return (self.x_title, *self.series)

    def cells(self) -> list[tuple[str, ...]]:
        """Return the numbers, a row for each place."""
        return [(name, *(_number(v[i]) for v in self.series.values())) for i, name in enumerate(self.names)]


@dataclass(frozen=True)
class HeatmapChart:
    """A map of shares in percent: which expert takes the tokens of a class, or which class is taken for which.

    Attributes:
        title, summary: heading and text alternative.
        row_title, column_title: meaning of rows and columns.
        rows, columns: their names.
        values: percent, a tuple for each row; NaN where there is nothing to show.
        value_title: meaning of the color.
        top: value at which the colors end; None: the largest.

    Raises:
        ValueError: values of another shape.
    """

    title: str
    summary: str
    row_title: str
    column_title: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: tuple[tuple[float, ...], ...]
    value_title: str = "share, %"
    top: float | None = None

    def __post_init__(self) -> None:
        if len(self.values) != len(self.rows) or any(len(row) != len(self.columns) for row in self.values):
            raise ValueError(f"heat map {self.title!r}: {len(self.values)} rows of values do not fit")

    @classmethod
    def of(
        cls,
        shares: np.ndarray,
        rows: Sequence[str],
        columns: Sequence[str] | None = None,
        *,
        title: str,
        row_title: str,
        column_title: str = "expert",
        value_title: str = "share, %",
    ) -> HeatmapChart:
        """Return the map of shares in 0..1, (rows, columns); the summary names the largest.

        Without names of ``columns`` they are numbers.
        """
        columns = tuple(map(str, range(shares.shape[1]))) if columns is None else tuple(columns)
        peak = ""
        if np.isfinite(shares).any():
            r, c = divmod(int(np.nanargmax(shares)), shares.shape[1])
            peak = f"; the largest is {100 * shares[r, c]:.0f} %, {row_title} {rows[r]} and {column_title} {columns[c]}"
        summary = f"{value_title} by {row_title} ({len(rows)}) and {column_title} ({len(columns)}){peak}."
        values = tuple(tuple(100 * float(v) for v in row) for row in shares)
        return cls(title, summary, row_title, column_title, tuple(rows), columns, values, value_title)

    @property
    def shown_top(self) -> float:
        """The value at which the colors end."""
        return self.top or max((v for row in self.values for v in row if math.isfinite(v)), default=0.0) or 1.0

    def headings(self) -> tuple[str, ...]:
        return (self.row_title, *self.columns)

    def cells(self) -> list[tuple[str, ...]]:
        """Return the numbers, as the map shows them."""
        return [
            (name, *("–" if math.isnan(v) else f"{v:.1f}" for v in row))
            for name, row in zip(self.rows, self.values, strict=True)
        ]


Chart = ScatterChart | LineChart | BarChart | HeatmapChart


def thinned_rows(rows: Sequence[tuple[str, ...]], most: int = MOST_ROWS) -> list[tuple[str, ...]]:
    """Return at most ``most`` rows at equal steps, the last among them."""
    if len(rows) <= most:
        return list(rows)
    return [rows[round(i * (len(rows) - 1) / (most - 1))] for i in range(most)]


def _number(value: float | None) -> str:
    if value is None or math.isnan(value):
        return "–"
    return f"{value:,.0f}" if value == round(value) and abs(value) < 1e15 else f"{value:.4g}"


_DIRECTIONS = ((1, 0), (1, -1), (0, -1), (-1, -1), (-1, 0), (-1, 1), (0, 1), (1, 1))
"""Places of a note beside its point, the best first: to the right, and up."""
_LETTER, _LINE = 5.2, 10.0
"""Width of a letter and height of a line of a note, in pixels."""


def placed(chart: ScatterChart, width: float, height: float) -> list[tuple[float, float]]:
    """Return the distance of the middle of each note from its point, to the right and down, in pixels.

    A note is placed so that it covers the least of points and of the notes before it.
    """
    drawn_x = [x for p in chart.points for x in (p.left, p.right) if x is not None] + [x for x, _ in chart.front]
    drawn_y = [y for p in chart.points for y in (p.low, p.high) if y is not None] + [y for _, y in chart.front]
    xs = _pixels([p.x for p in chart.points], drawn_x, width, 24, chart.log_x)
    ys = _pixels([p.y for p in chart.points], drawn_y, height, 16, False)
    ys = ys if chart.is_reversed else [height - y for y in ys]
    lefts, rights = (
        _pixels([end or p.x for p, end in zip(chart.points, ends, strict=True)], drawn_x, width, 24, chart.log_x)
        for ends in ([p.left for p in chart.points], [p.right for p in chart.points])
    )
    bars = zip(lefts, rights, ys, strict=True)
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in zip(xs, ys, strict=True)]
    taken += [(left, y - 1, right, y + 1) for left, right, y in bars]
    offsets = []
    for point, x, y in zip(chart.points, xs, ys, strict=True):
        half, best = _LETTER * len(point.note) / 2, None
        for far, (right, down) in itertools.product((8, 15, 23), _DIRECTIONS):
            dx, dy = right * (far + half), down * (far + _LINE / 2)
            box = (x + dx - half, y + dy - _LINE / 2, x + dx + half, y + dy + _LINE / 2)
            covered = sum(b[0] < box[2] and box[0] < b[2] and b[1] < box[3] and box[1] < b[3] for b in taken)
            covered += box[0] < 0 or box[2] > width or box[1] < 0 or box[3] > height
            if best is None or covered < best[0]:
                best = (covered, box, (dx, dy))
        assert best is not None
        offsets.append(best[2])
        taken += [best[1]] if point.note else []
    return offsets


def _pixels(values: list[float], others: list[float], length: float, margin: float, is_log: bool) -> list[float]:
    """Return the places of values on an axis that spans them and ``others``."""
    scale = math.log10 if is_log else float
    low, high = scale(min(values + others)), scale(max(values + others))
    return [margin + (length - 2 * margin) * (scale(v) - low) / ((high - low) or 1.0) for v in values]
