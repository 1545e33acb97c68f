"""Charts of a page as plain values, which Vega-Lite draws through Altair; each has its numbers as a table as well.

Every chart has a ``summary``: what one sees in it, in a sentence, for those who do not see it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from apps.report.heatmaps import Heatmap
from apps.report.plots import PALETTE

if TYPE_CHECKING:
    import altair as alt

MOST_POINTS = 200
"""Points of a line up to which each is drawn; a longer line is drawn by the means of as many parts."""

MOST_ROWS = 60
"""Rows of the table below a chart; a longer one keeps rows at equal steps."""

_HEIGHT = 260
_NEUTRAL = "#8a8a8a"  # is seen on light and on dark ground


@dataclass(frozen=True)
class Point:
    """A point of a ``ScatterChart``.

    Attributes:
        label: name of its series, shown in the legend.
        x, y: its place.
        low, high: ends of the interval of ``y``; None draws none.
    """

    label: str
    x: float
    y: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class ScatterChart:
    """Points with error bars, such as quality against cost.

    Attributes:
        title, summary: heading and text alternative.
        x_title, y_title: names of the axes, with units.
        points: the points, at least one.
        log_x: the horizontal axis is logarithmic; all x are above 0.
    """

    title: str
    summary: str
    x_title: str
    y_title: str
    points: tuple[Point, ...]
    log_x: bool = False

    def headings(self) -> tuple[str, ...]:
        return ("", self.x_title, self.y_title, "95 % interval")

    def cells(self) -> list[tuple[str, ...]]:
        """Return the numbers, a row a point."""
        return [
            (p.label, _number(p.x), _number(p.y), "–" if p.low is None else f"{_number(p.low)} to {_number(p.high)}")
            for p in self.points
        ]

    def draw(self) -> alt.LayerChart:
        import altair as alt

        rows = [
            {"label": p.label, "x": _finite(p.x), "y": _finite(p.y), "low": _finite(p.low), "high": _finite(p.high)}
            for p in self.points
        ]
        labels = list(dict.fromkeys(p.label for p in self.points))
        chosen = alt.selection_point(fields=["label"], bind="legend", name="chosen")
        faded = alt.condition(chosen, alt.value(1.0), alt.value(0.15))
        large = max(abs(p.x) for p in self.points) >= 10_000
        x = alt.X("x:Q", title=self.x_title, scale=_across(self.log_x, padding=24))
        x = x.axis(format="~s" if large else "~g", labelOverlap=True)
        color = alt.Color("label:N", title=None, scale=_colors(labels))
        base = alt.Chart(alt.Data(values=rows)).encode(x=x, color=color, opacity=faded)
        bars = (
            base.transform_filter("isValid(datum.low)").mark_rule(strokeWidth=2).encode(y=alt.Y("low:Q"), y2="high:Q")
        )
        points = base.mark_point(filled=True, size=110).encode(
            y=alt.Y("y:Q", title=self.y_title, scale=alt.Scale(zero=False)),
            shape=alt.Shape("label:N", title=None, scale=alt.Scale(domain=labels)),
            tooltip=[
                alt.Tooltip("label:N", title="model"),
                alt.Tooltip("x:Q", title=self.x_title, format=".4~g"),
                alt.Tooltip("y:Q", title=self.y_title, format=".4~g"),
                alt.Tooltip("low:Q", title="interval from", format=".4~g"),
                alt.Tooltip("high:Q", title="to", format=".4~g"),
            ],
        )
        return alt.layer(bars, points.add_params(chosen)).properties(width="container", height=_HEIGHT)


@dataclass(frozen=True)
class Line:
    """A line of a ``LineChart``.

    Attributes:
        label: name of the line in the legend; lines of one label have one colour.
        x, y: its points, of one length, by rising x; NaN in ``y`` leaves a gap.
        part: tells lines of one label apart, such as "seed 1"; empty for a single one.

    Raises:
        ValueError: x and y differ in length.
    """

    label: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    part: str = ""

    def __post_init__(self) -> None:
        if len(self.x) != len(self.y):
            raise ValueError(f"line {self.label!r} has {len(self.x)} x for {len(self.y)} y")

    @property
    def name(self) -> str:
        return f"{self.label}, {self.part}" if self.part else self.label

    def thinned(self, most: int) -> Line:
        """Return the line by the means of ``most`` parts of equal length, or as it is where it has no more points."""
        if len(self.x) <= most:
            return self
        ends = [round(i * len(self.x) / most) for i in range(most + 1)]
        parts = list(itertools.pairwise(ends))
        x, y = (tuple(math.fsum(v[a:b]) / (b - a) for a, b in parts) for v in (self.x, self.y))
        return Line(self.label, x, y, self.part)


@dataclass(frozen=True)
class LineChart:
    """Lines over a common axis, such as learning curves.

    Attributes:
        title, summary: heading and text alternative.
        x_title, y_title: names of the axes, with units.
        lines: the lines, at least one.
        diagonal: draw where y equals x as well, as in a calibration curve.
        log_x: the horizontal axis is logarithmic; all x are above 0.
    """

    title: str
    summary: str
    x_title: str
    y_title: str
    lines: tuple[Line, ...]
    diagonal: bool = False
    log_x: bool = False

    def headings(self) -> tuple[str, ...]:
        return (self.x_title, *(line.name for line in self.lines))

    def cells(self) -> list[tuple[str, ...]]:
        """Return the numbers, a row for each x and a column for each line."""
        by_line = [dict(zip(line.x, line.y, strict=True)) for line in self.lines]
        places = sorted({x for line in self.lines for x in line.x})
        return [(_number(x), *(_number(own.get(x)) for own in by_line)) for x in places]

    def draw(self) -> alt.LayerChart:
        import altair as alt

        rows = [
            {"label": line.label, "name": line.name, "x": _finite(x), "y": _finite(y)}
            for line in (line.thinned(MOST_POINTS) for line in self.lines)
            for x, y in zip(line.x, line.y, strict=True)
        ]
        labels = list(dict.fromkeys(line.label for line in self.lines))
        chosen = alt.selection_point(fields=["label"], bind="legend", name="chosen")
        # The wheel alone scrolls the page.
        zoom = alt.selection_interval(bind="scales", encodings=["x"], name="zoom", zoom="wheel![event.shiftKey]")
        few = max(len(line.x) for line in self.lines) <= 30
        lines = (
            alt.Chart(alt.Data(values=rows))
            .mark_line(point=alt.OverlayMarkDef(size=28, filled=True) if few else False, strokeWidth=1.8, clip=True)
            .encode(
                x=alt.X("x:Q", title=self.x_title, scale=_across(self.log_x)),
                y=alt.Y("y:Q", title=self.y_title, scale=alt.Scale(zero=False)),
                color=alt.Color("label:N", title=None, scale=_colors(labels)).legend(_legend(labels)),
                detail="name:N",
                opacity=alt.condition(chosen, alt.value(0.9), alt.value(0.1)),
                tooltip=[
                    alt.Tooltip("name:N", title="line"),
                    alt.Tooltip("x:Q", title=self.x_title, format=".4~g"),
                    alt.Tooltip("y:Q", title=self.y_title, format=".4~g"),
                ],
            )
            .add_params(chosen, zoom)
        )
        layers: list[Any] = [lines]
        if self.diagonal:
            values = [v for line in self.lines for v in (*line.x, *line.y) if math.isfinite(v)]
            ends = [{"x": v, "y": v} for v in (min(values, default=0.0), max(values, default=1.0))]
            diagonal = alt.Chart(alt.Data(values=ends)).mark_line(strokeDash=[5, 4], color=_NEUTRAL)
            layers.insert(0, diagonal.encode(x="x:Q", y="y:Q"))
        return alt.layer(*layers).properties(width="container", height=_HEIGHT)


@dataclass(frozen=True)
class BarChart:
    """Bars side by side, such as the load of each expert.

    Attributes:
        title, summary: heading and text alternative.
        x_title, y_title: names of the axes, with units.
        names: names of the bars' places.
        series: a value for each place, by the name of the series.
        line: value at which a line lies across, such as an even share; None for none.

    Raises:
        ValueError: a series of another length than the names.
    """

    title: str
    summary: str
    x_title: str
    y_title: str
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

    def draw(self) -> alt.LayerChart:
        import altair as alt

        labels = list(self.series)
        rows = [
            {"name": name, "label": label, "y": _finite(values[i])}
            for label, values in self.series.items()
            for i, name in enumerate(self.names)
        ]
        several = len(labels) > 1
        chosen = alt.selection_point(fields=["label"], bind="legend", name="chosen")
        bars = alt.Chart(alt.Data(values=rows)).mark_bar()
        bars = bars.encode(
            x=alt.X(
                "name:N", title=self.x_title, sort=list(self.names), axis=alt.Axis(labelAngle=0, labelOverlap=True)
            ),
            y=alt.Y("y:Q", title=self.y_title),
            color=alt.Color("label:N", title=None, scale=_colors(labels)) if several else alt.value(PALETTE[0]),
            opacity=alt.condition(chosen, alt.value(1.0), alt.value(0.15)),
            tooltip=[
                alt.Tooltip("name:N", title=self.x_title),
                alt.Tooltip("label:N", title="series"),
                alt.Tooltip("y:Q", title=self.y_title, format=".4~g"),
            ],
        )
        if several:
            bars = bars.encode(xOffset=alt.XOffset("label:N", sort=labels))
            bars = bars.add_params(chosen)
        else:
            bars = bars.encode(opacity=alt.value(1.0))
        layers: list[Any] = [bars]
        if self.line is not None:
            rule = alt.Chart(alt.Data(values=[{"y": self.line}])).mark_rule(strokeDash=[5, 4], color=_NEUTRAL)
            layers.append(rule.encode(y="y:Q"))
        return alt.layer(*layers).properties(width="container", height=_HEIGHT)


@dataclass(frozen=True)
class HeatmapChart:
    """A map of shares in percent: which expert takes the tokens of a class, or which class is taken for which.

    Attributes:
        title, summary: heading and text alternative.
        row_title, column_title: meaning of rows and columns.
        rows, columns: their names.
        values: percent, a tuple for each row; NaN where there is nothing to show.
        value_title: meaning of the colour.

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

    def __post_init__(self) -> None:
        if len(self.values) != len(self.rows) or any(len(row) != len(self.columns) for row in self.values):
            raise ValueError(
                f"heat map {self.title!r}: {len(self.values)} rows of values for {len(self.rows)} rows and "
                f"{len(self.columns)} columns"
            )

    @classmethod
    def of(
        cls, m: Heatmap, title: str, row_title: str, column_title: str = "expert", value_title: str = "share, %"
    ) -> HeatmapChart:
        """Return the chart of a map of shares in 0..1; the summary names the largest share."""
        values = tuple(tuple(100 * float(v) for v in row) for row in m.values)
        cells = [(v, r, c) for r, row in zip(m.rows, values, strict=True) for c, v in zip(m.columns, row, strict=True)]
        cells = [cell for cell in cells if math.isfinite(cell[0])]
        top = max(cells, default=None)
        peak = f"; the largest is {top[0]:.0f} %, {row_title} {top[1]} and {column_title} {top[2]}" if top else ""
        summary = f"{value_title} by {row_title} ({len(m.rows)}) and {column_title} ({len(m.columns)}){peak}."
        return cls(title, summary, row_title, column_title, m.rows, m.columns, values, value_title)

    def headings(self) -> tuple[str, ...]:
        return (self.row_title, *self.columns)

    def cells(self) -> list[tuple[str, ...]]:
        """Return the numbers, as they stand in the map."""
        return [
            (name, *("–" if math.isnan(v) else f"{v:.1f}" for v in row))
            for name, row in zip(self.rows, self.values, strict=True)
        ]

    def draw(self) -> alt.LayerChart:
        import altair as alt

        rows: list[dict[str, Any]] = [
            {"row": r, "column": c, "value": float(f"{v:.4g}")}
            for r, own in zip(self.rows, self.values, strict=True)
            for c, v in zip(self.columns, own, strict=True)
            if math.isfinite(v)
        ]
        top = max((r["value"] for r in rows), default=1.0) or 1.0
        x = alt.X("column:N", title=self.column_title, sort=list(self.columns))
        x = x.axis(labelOverlap=True, labelAngle=0 if max(map(len, self.columns)) <= 4 else -45)
        y = alt.Y("row:N", title=None, sort=list(self.rows)).axis(labelLimit=140)
        base = alt.Chart(alt.Data(values=rows)).encode(x=x, y=y)
        tooltip = [
            alt.Tooltip("row:N", title=self.row_title),
            alt.Tooltip("column:N", title=self.column_title),
            alt.Tooltip("value:Q", title=self.value_title, format=".1f"),
        ]
        cells = base.mark_rect().encode(
            color=alt.Color("value:Q", title=self.value_title, scale=alt.Scale(scheme="cividis", domain=[0, top])),
            tooltip=tooltip,
        )
        layers: list[Any] = [cells]
        if len(self.columns) <= 16:
            bright = f"datum.value > {0.6 * top}"
            layers.append(
                base.mark_text(fontSize=10, aria=False).encode(
                    text=alt.Text("value:Q", format=".0f"),
                    color=alt.condition(bright, alt.value("black"), alt.value("white")),
                )
            )
        return alt.layer(*layers).properties(width="container", height=20 * len(self.rows))


@dataclass(frozen=True)
class ChoicePoint:
    """A point of a ``ChoiceChart``.

    Attributes:
        label: its name.
        figures: its figures by name; not every point has all.
    """

    label: str
    figures: dict[str, float]


@dataclass(frozen=True)
class ChoiceChart:
    """Points whose axes the reader chooses among their figures.

    Attributes:
        title, summary: heading and text alternative.
        points: the points.
    """

    title: str
    summary: str
    points: tuple[ChoicePoint, ...]

    def names(self) -> list[str]:
        """Return the figures that the axes may show."""
        return list(dict.fromkeys(name for point in self.points for name in point.figures))

    def headings(self) -> tuple[str, ...]:
        return ("", *self.names())

    def cells(self) -> list[tuple[str, ...]]:
        """Return the figures, a row a point."""
        return [(p.label, *(_number(p.figures.get(name)) for name in self.names())) for p in self.points]

    def draw(self) -> alt.Chart:
        import altair as alt

        names = self.names()
        rows = [{"label": p.label, **{n: _finite(v) for n, v in p.figures.items()}} for p in self.points]
        up = alt.param(name="up", value=names[0], bind=alt.binding_select(options=names, name="vertical axis "))
        across = alt.param(
            name="across",
            value=names[min(1, len(names) - 1)],
            bind=alt.binding_select(options=names, name="horizontal axis "),
        )
        return (
            alt.Chart(alt.Data(values=rows))
            .transform_calculate(x="datum[across]", y="datum[up]")
            .transform_filter("isValid(datum.x) && isValid(datum.y)")
            .mark_point(filled=True, size=90, color=PALETTE[0])
            .encode(
                x=alt.X("x:Q", title=None, scale=alt.Scale(zero=False, padding=20)),
                y=alt.Y("y:Q", title=None, scale=alt.Scale(zero=False, padding=20)),
                tooltip=[alt.Tooltip("label:N", title="model"), alt.Tooltip("x:Q"), alt.Tooltip("y:Q")],
            )
            .add_params(up, across)
            .properties(width="container", height=_HEIGHT)
        )


Chart = ScatterChart | LineChart | BarChart | HeatmapChart | ChoiceChart


def thinned_rows(rows: Sequence[tuple[str, ...]], most: int = MOST_ROWS) -> list[tuple[str, ...]]:
    """Return at most ``most`` rows at equal steps, the last among them."""
    if len(rows) <= most:
        return list(rows)
    return [rows[round(i * (len(rows) - 1) / (most - 1))] for i in range(most)]


def vega_lite(chart: Chart) -> dict[str, Any]:
    """Return the Vega-Lite specification of a chart, without a title: the page has it as a heading."""
    spec = chart.draw().properties(description=f"{chart.title}. {chart.summary}").to_dict()
    return {**spec, "config": _CONFIG}


def _number(value: float | None) -> str:
    if value is None or math.isnan(value):
        return "–"
    return f"{value:,.0f}" if value == round(value) and abs(value) < 1e15 else f"{value:.4g}"


def _finite(value: float | None) -> float | None:
    """Return a number to seven digits, which is short; None for NaN and infinity, which JSON does not have."""
    return float(f"{value:.7g}") if value is not None and math.isfinite(value) else None


def _legend(labels: Sequence[str]) -> alt.Legend | None:
    """Return a legend of the usual form; None where there is nothing to tell apart."""
    import altair as alt

    return alt.Legend() if len(labels) > 1 else None


def _across(is_log: bool, **options: Any) -> alt.Scale:
    """Return the scale of a horizontal axis; a logarithmic one may not speak of zero."""
    import altair as alt

    return alt.Scale(nice=False, **options, **({"type": "log"} if is_log else {"zero": False}))


def _colors(labels: Sequence[str]) -> alt.Scale:
    import altair as alt

    return alt.Scale(domain=list(labels), range=[PALETTE[i % len(PALETTE)] for i in range(len(labels))])


# Texts and lines have the colour of the page around them, light or dark.
_TEXT = {"labelColor": "currentColor", "titleColor": "currentColor"}
_CONFIG: Mapping[str, Any] = {
    "background": "transparent",
    "font": "system-ui, sans-serif",
    "view": {"stroke": None},
    "axis": {**_TEXT, "domainColor": "currentColor", "tickColor": "currentColor", "gridColor": "currentColor",
             "gridOpacity": 0.12, "domainOpacity": 0.4, "tickOpacity": 0.4, "titleFontWeight": "normal"},
    "legend": {**_TEXT, "orient": "bottom", "columns": 2, "labelLimit": 240, "titleFontWeight": "normal"},
}  # fmt: skip
