"""The charts of a page, drawn by Vega-Lite through Altair: its specification of each."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from apps.report.page.charts import BarChart, Chart, HeatmapChart, LineChart, ScatterChart
from apps.report.plots import PALETTE, shape_of

if TYPE_CHECKING:
    import altair as alt

MOST_POINTS = 200
"""Points of a line up to which each is drawn; a longer line is drawn by the means of as many parts."""

MOST_SLANTED = 20
"""Bars up to which long names all stand below them."""

_SHAPES = (
    "circle", "square", "triangle-up", "diamond", "cross", "triangle-right", "triangle-down", "triangle-left",
)  # fmt: skip
_HEIGHT = 260
_NEUTRAL = "#8a8a8a"  # is seen on light and on dark ground


def vega_lite(chart: Chart) -> dict[str, Any]:
    """Return the Vega-Lite specification of a chart, without a title: the page has it as a heading."""
    drawn = _DRAW[type(chart)](chart)
    return {**drawn.properties(description=f"{chart.title}. {chart.summary}").to_dict(), "config": _CONFIG}


def _scatter(chart: ScatterChart) -> alt.LayerChart:
    import altair as alt

    rows = [
        {"label": p.label, "x": _finite(p.x), "y": _finite(p.y), "low": _finite(p.low), "high": _finite(p.high)}
        for p in chart.points
    ]
    labels = list(dict.fromkeys(p.label for p in chart.points))
    chosen = alt.selection_point(fields=["label"], bind="legend", name="chosen")
    faded = alt.condition(chosen, alt.value(1.0), alt.value(0.15))
    large = max(abs(p.x) for p in chart.points) >= 10_000
    x = alt.X("x:Q", title=chart.x_title, scale=_across(chart.log_x, padding=24))
    x = x.axis(format="~s" if large else "~g", labelOverlap=True)
    color = alt.Color("label:N", title=None, scale=_colors(labels))
    base = alt.Chart(alt.Data(values=rows)).encode(x=x, color=color, opacity=faded)
    bars = base.transform_filter("isValid(datum.low)").mark_rule(strokeWidth=2).encode(y=alt.Y("low:Q"), y2="high:Q")
    points = base.mark_point(filled=True, size=110).encode(
        y=alt.Y("y:Q", title=chart.y_title, scale=alt.Scale(zero=False)),
        shape=alt.Shape("label:N", title=None, scale=_shapes(labels)),
        tooltip=[
            alt.Tooltip("label:N", title="model"),
            alt.Tooltip("x:Q", title=chart.x_title, format=".4~g"),
            alt.Tooltip("y:Q", title=chart.y_title, format=".4~g"),
            alt.Tooltip("low:Q", title="interval from", format=".4~g"),
            alt.Tooltip("high:Q", title="to", format=".4~g"),
        ],
    )
    return alt.layer(bars, points.add_params(chosen)).properties(width="container", height=_HEIGHT)


def _lines(chart: LineChart) -> alt.LayerChart:
    import altair as alt

    rows = [
        {"label": line.label, "name": line.name, "x": _finite(x), "y": _finite(y)}
        for line in (line.thinned(MOST_POINTS) for line in chart.lines)
        for x, y in zip(line.x, line.y, strict=True)
    ]
    labels = list(dict.fromkeys(line.label for line in chart.lines))
    chosen = alt.selection_point(fields=["label"], bind="legend", name="chosen")
    # The wheel alone scrolls the page.
    zoom = alt.selection_interval(bind="scales", encodings=["x"], name="zoom", zoom="wheel![event.shiftKey]")
    few = max(len(line.x) for line in chart.lines) <= 30
    lines = (
        alt.Chart(alt.Data(values=rows))
        .mark_line(point=alt.OverlayMarkDef(size=28, filled=True) if few else False, strokeWidth=1.8, clip=True)
        .encode(
            x=alt.X("x:Q", title=chart.x_title, scale=_across(chart.log_x)),
            y=alt.Y("y:Q", title=chart.y_title, scale=alt.Scale(zero=False)),
            color=alt.Color("label:N", title=None, scale=_colors(labels)).legend(_legend(labels)),
            detail="name:N",
            opacity=alt.condition(chosen, alt.value(0.9), alt.value(0.1)),
            tooltip=[
                alt.Tooltip("name:N", title="line"),
                alt.Tooltip("x:Q", title=chart.x_title, format=".4~g"),
                alt.Tooltip("y:Q", title=chart.y_title, format=".4~g"),
            ],
        )
        .add_params(chosen, zoom)
    )
    layers: list[Any] = [lines]
    if chart.diagonal:
        values = [v for line in chart.lines for v in (*line.x, *line.y) if math.isfinite(v)]
        ends = [{"x": v, "y": v} for v in (min(values, default=0.0), max(values, default=1.0))]
        diagonal = alt.Chart(alt.Data(values=ends)).mark_line(strokeDash=[5, 4], color=_NEUTRAL)
        layers.insert(0, diagonal.encode(x="x:Q", y="y:Q"))
    return alt.layer(*layers).properties(width="container", height=_HEIGHT)


def _bars(chart: BarChart) -> alt.LayerChart:
    import altair as alt

    labels = list(chart.series)
    rows = [
        {"name": name, "label": label, "y": _finite(values[i])}
        for label, values in chart.series.items()
        for i, name in enumerate(chart.names)
    ]
    several = len(labels) > 1
    chosen = alt.selection_point(fields=["label"], bind="legend", name="chosen")
    # Names that are too long to stand side by side are slanted, so that none is left out.
    is_long = sum(map(len, chart.names)) > 60 and len(chart.names) <= MOST_SLANTED
    axis = alt.Axis(labelAngle=-45 if is_long else 0, labelOverlap=not is_long, labelLimit=140)
    bars = alt.Chart(alt.Data(values=rows)).mark_bar()
    bars = bars.encode(
        x=alt.X("name:N", title=chart.x_title, sort=list(chart.names), axis=axis),
        y=alt.Y("y:Q", title=chart.y_title),
        color=alt.Color("label:N", title=None, scale=_colors(labels)) if several else alt.value(PALETTE[0]),
        opacity=alt.condition(chosen, alt.value(1.0), alt.value(0.15)),
        tooltip=[
            alt.Tooltip("name:N", title=chart.x_title),
            alt.Tooltip("label:N", title="series"),
            alt.Tooltip("y:Q", title=chart.y_title, format=".4~g"),
        ],
    )
    if several:
        bars = bars.encode(xOffset=alt.XOffset("label:N", sort=labels))
        bars = bars.add_params(chosen)
    else:
        bars = bars.encode(opacity=alt.value(1.0))
    layers: list[Any] = [bars]
    if chart.line is not None:
        rule = alt.Chart(alt.Data(values=[{"y": chart.line}])).mark_rule(strokeDash=[5, 4], color=_NEUTRAL)
        layers.append(rule.encode(y="y:Q"))
    return alt.layer(*layers).properties(width="container", height=_HEIGHT)


def _heatmap(chart: HeatmapChart) -> alt.LayerChart:
    import altair as alt

    rows: list[dict[str, Any]] = [
        {"row": r, "column": c, "value": float(f"{v:.4g}")}
        for r, own in zip(chart.rows, chart.values, strict=True)
        for c, v in zip(chart.columns, own, strict=True)
        if math.isfinite(v)
    ]
    top = max((r["value"] for r in rows), default=1.0) or 1.0
    x = alt.X("column:N", title=chart.column_title, sort=list(chart.columns))
    x = x.axis(labelOverlap=True, labelAngle=0 if max(map(len, chart.columns)) <= 4 else -45)
    y = alt.Y("row:N", title=None, sort=list(chart.rows)).axis(labelLimit=140)
    base = alt.Chart(alt.Data(values=rows)).encode(x=x, y=y)
    tooltip = [
        alt.Tooltip("row:N", title=chart.row_title),
        alt.Tooltip("column:N", title=chart.column_title),
        alt.Tooltip("value:Q", title=chart.value_title, format=".1f"),
    ]
    cells = base.mark_rect().encode(
        color=alt.Color("value:Q", title=chart.value_title, scale=alt.Scale(scheme="cividis", domain=[0, top])),
        tooltip=tooltip,
    )
    layers: list[Any] = [cells]
    if len(chart.columns) <= 16:
        bright = f"datum.value > {0.6 * top}"
        layers.append(
            base.mark_text(fontSize=10, aria=False).encode(
                text=alt.Text("value:Q", format=".0f"),
                color=alt.condition(bright, alt.value("black"), alt.value("white")),
            )
        )
    return alt.layer(*layers).properties(width="container", height=20 * len(chart.rows))


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


def _shapes(labels: Sequence[str]) -> alt.Scale:
    """Return a shape for each label, so that two of one colour have two shapes."""
    import altair as alt

    return alt.Scale(domain=list(labels), range=[shape_of(i, _SHAPES) for i in range(len(labels))])


_DRAW: Mapping[type, Callable[[Any], Any]] = {
    ScatterChart: _scatter,
    LineChart: _lines,
    BarChart: _bars,
    HeatmapChart: _heatmap,
}

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
