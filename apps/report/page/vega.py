"""The charts of a report, rendered by Vega-Lite through Altair: live on a page, still in a PNG file.

Altair takes a second to import, so this module is imported when a chart is rendered.
"""

from __future__ import annotations

import math
import textwrap
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import altair as alt
from altair.utils.schemapi import debug_mode

from apps.report.colors import PALETTE, color_of, expert_colors, ink_on, shape_of
from apps.report.page.charts import BarChart, Chart, HeatmapChart, LineChart, ScatterChart, placed
from apps.report.page.parts import Words

MOST_POINTS = 200
"""Points of a line up to which each is drawn; a longer line is drawn by the means of as many parts."""

MOST_SLANTED = 20
"""Bars up to which long names all stand below them."""

MOST_NUMBERED = 16
"""Columns of a map up to which each cell has its number."""

_SHAPES = (
    "circle", "square", "triangle-up", "diamond", "cross", "triangle-right", "triangle-down", "triangle-left",
)  # fmt: skip
_HEIGHT = 260
_WIDEST = 1300
"""Pixels of charts side by side in a file."""
_NEUTRAL = "#8a8a8a"  # is seen on light and on dark ground


# Altair would check each part, and then the whole, against its schema: half the time of a page's charts.
_unchecked = debug_mode(False)


@_unchecked
def vega_lite(chart: Chart) -> dict[str, Any]:
    """Return the Vega-Lite specification of a chart, without a title: the page has it as a heading."""
    drawn = _DRAW[type(chart)](chart, False).properties(width="container")
    described = drawn.properties(description=f"{chart.title}. {chart.summary}")
    return {**described.to_dict(validate=False), "config": _CONFIG}


@_unchecked
def still(charts: Sequence[Chart | Words], title: str) -> dict[str, Any]:
    """Return the Vega-Lite specification of a file of charts; see ``html.png_of``."""
    maps = [chart for chart in charts if isinstance(chart, HeatmapChart)]
    top = max((chart.shown_top for chart in maps), default=1.0)
    charts = [replace(c, top=top) if isinstance(c, HeatmapChart) else c for c in charts]
    # The common prefix of several charts' titles is said once, in the title of the file.
    heads = {chart.title.rpartition(", ")[0] for chart in charts}
    common = f"{heads.pop()}, " if len(heads) == 1 and (len(charts) > 1 or maps) else ""
    lines: list[list[Any]] = []
    room = 0
    for before, chart, after in zip((None, *charts), charts, (*charts[1:], None), strict=False):
        width, names = _width(chart), _names(chart)
        continues = isinstance(chart, HeatmapChart) and names == _names(before) and room >= width + 30
        needed = width + (30 if continues else 7 * max(map(len, names), default=5) + 60)
        if room < needed:
            lines.append([])
            room, continues = _WIDEST, False
        room -= needed
        drawn = _DRAW[type(chart)](chart, True)
        if _series(chart) == _series(after):  # one legend serves both
            _drop_legends(drawn)
        if continues:
            for layer in drawn.layer:
                layer.encoding.y.axis = None
        heading = "" if chart.title == title else chart.title.removeprefix(common)
        note = textwrap.wrap(chart.summary, max(width // 5, 24)) if isinstance(chart, BarChart) else []
        head = {"title": alt.Title(heading, subtitle=note)} if heading or note else {}
        lines[-1].append(drawn.properties(width=width, **head))
    own: dict[str, Any] = {"color": "independent", "shape": "independent"}
    heights = {chart.y_title if isinstance(chart, BarChart) else None for chart in charts}
    of_line = {**own, **({"y": "shared"} if len(heights) == 1 and None not in heights else {})}
    rows = [alt.hconcat(*line, spacing=24).resolve_scale(**of_line) for line in lines]
    whole = alt.vconcat(*rows, spacing=24).resolve_scale(**own)
    titled = whole.properties(title=alt.Title(title, fontSize=14, offset=14))
    return {**titled.to_dict(validate=False), "config": _STILL}


def _width(chart: Chart | Words) -> int:
    """Return the width of a chart in a file, in pixels."""
    if isinstance(chart, HeatmapChart):
        count = len(chart.columns)
        return max(90, (30 if count <= MOST_NUMBERED else 18 if count <= 32 else 10) * count)
    if isinstance(chart, Words):
        return 44 * len(chart.labels)
    if isinstance(chart, BarChart):
        return min(max(150, 22 * len(chart.names) * len(chart.series)), _WIDEST - 100)
    return 300


def _names(chart: Chart | Words | None) -> tuple[str, ...]:
    """Return the names to the left of a chart."""
    return chart.rows if isinstance(chart, HeatmapChart) else chart.words if isinstance(chart, Words) else ()


def _series(chart: Chart | Words | None) -> tuple[str, ...]:
    """Return the series that a chart's legend tells apart."""
    if isinstance(chart, HeatmapChart):
        return (chart.value_title,)
    series = chart.points if isinstance(chart, ScatterChart) else chart.lines if isinstance(chart, LineChart) else ()
    return tuple(dict.fromkeys(own.label for own in series)) or (type(chart).__name__, repr(chart))


def _drop_legends(drawn: alt.LayerChart) -> None:
    for layer in drawn.layer:
        for channel in ("color", "shape"):
            own = getattr(layer.encoding, channel)
            if isinstance(own, (alt.Color, alt.Shape)):
                own.legend = None


def _fading(is_still: bool, high: float, low: float) -> tuple[list[Any], Any]:
    """Return parameters and an opacity that fades all but the series that was chosen in the legend."""
    if is_still:
        return [], alt.value(high)
    chosen = alt.selection_point(fields=["label"], bind="legend", name="chosen")
    return [chosen], alt.condition(chosen, alt.value(high), alt.value(low))


def _scatter(chart: ScatterChart, is_still: bool) -> alt.LayerChart:
    points = placed(chart, 300, _HEIGHT) if is_still else [(0.0, 0.0)] * len(chart.points)
    labels = list(dict.fromkeys(p.label for p in chart.points))
    rows = [
        {"label": p.label, "x": _finite(p.x), "y": _finite(p.y), "low": _finite(p.low), "high": _finite(p.high),
         "left": _finite(p.left), "right": _finite(p.right), "note": p.note, "dx": dx, "dy": dy,
         "bar": max(2, 6 - 2 * labels.index(p.label)), "size": max(50, 110 - 40 * labels.index(p.label))}
        for p, (dx, dy) in zip(chart.points, points, strict=True)
    ]  # fmt: skip
    shapes = [shape_of(i, _SHAPES) for i in range(len(labels))]  # two of one color have two shapes
    params, faded = _fading(is_still, 1.0, 0.15)
    large = max(abs(p.x) for p in chart.points) >= 10_000
    x = alt.X("x:Q", title=chart.x_title, scale=_across(chart.log_x, padding=24))
    x = x.axis(format="~s" if large else "~g", labelOverlap=True)
    kind: dict[str, Any] = {}
    if chart.log_y:  # a domain of its own: whole decades would leave most of the chart empty
        heights = [y for p in chart.points for y in (p.y, p.low, p.high) if y] + [y for c in chart.curves for y in c.y]
        kind = {"type": "log", "nice": False, "domain": [0.97 * min(heights), 1.03 * max(heights)]}
    scale = alt.Scale(zero=False, reverse=chart.is_reversed, padding=16, **kind)
    y = alt.Y("y:Q", title=chart.y_title, scale=scale)
    color = alt.Color("label:N", title=None, scale=_colors(labels)).legend(_legend(labels))
    base = alt.Chart(alt.Data(values=rows)).encode(x=x, color=color, opacity=faded)
    # Models of equal cost share an x: what is drawn later is thinner and smaller, so that both are seen.
    bars = base.transform_filter("isValid(datum.low)").mark_rule(strokeWidth=alt.expr("datum.bar"))
    bars = bars.encode(y=alt.Y("low:Q"), y2="high:Q")
    points_of = base.mark_point(filled=True, size=alt.expr("datum.size")).encode(
        y=y,
        shape=alt.Shape("label:N", title=None, scale=alt.Scale(domain=labels, range=shapes)).legend(_legend(labels)),
        tooltip=_tips(
            ("label:N", "model"),
            *([("note:N", "form")] if any(p.note for p in chart.points) else []),
            *(("x:Q", chart.x_title), ("y:Q", chart.y_title), ("low:Q", "interval from"), ("high:Q", "to")),
        ),
    )
    layers: list[Any] = [bars, points_of.add_params(*params)]
    if any(p.left is not None for p in chart.points):
        across = base.transform_filter("isValid(datum.left)").mark_rule(strokeWidth=1.5)
        layers.insert(1, across.encode(x=alt.X("left:Q"), x2="right:Q", y=y))
    if chart.curves:
        places = [
            {"label": c.label, "part": c.part, "x": _finite(x), "y": _finite(y)}
            for c in chart.curves
            for x, y in zip(c.x, c.y, strict=True)
        ]
        curves = alt.Chart(alt.Data(values=places)).mark_line(strokeWidth=1.8)
        parts = list(dict.fromkeys(c.part for c in chart.curves))  # the first is drawn through
        strokes = alt.Scale(domain=parts, range=[[1, 0], [5, 4]][: len(parts)])
        dashes = alt.StrokeDash("part:N", legend=None, scale=strokes)
        layers.insert(0, curves.encode(x=x, y=y, color=color, strokeDash=dashes, opacity=faded))
    if chart.front:
        steps = [{"x": _finite(x), "y": _finite(y)} for x, y in chart.front]
        line = alt.Chart(alt.Data(values=steps)).mark_line(interpolate="step-after", strokeWidth=5, opacity=0.35)
        layers.insert(0, line.encode(x=x, y=y, color=alt.value(_NEUTRAL)))
    if is_still and any(p.note for p in chart.points):
        where = {"dx": alt.expr("datum.dx"), "dy": alt.expr("datum.dy")}
        layers.append(base.mark_text(fontSize=9, **where).encode(y=y, text="note:N", color=alt.value("#333")))
    return alt.layer(*layers).properties(height=_HEIGHT)


def _lines(chart: LineChart, is_still: bool) -> alt.LayerChart:
    rows = [
        {"label": line.label, "name": line.name, "x": _finite(x), "y": _finite(y if y > 0 or not chart.log_y else None)}
        for line in (line.thinned(MOST_POINTS) for line in chart.lines)
        for x, y in zip(line.x, line.y, strict=True)
    ]
    labels = list(dict.fromkeys(line.label for line in chart.lines))
    params, faded = _fading(is_still, 0.9, 0.1)
    if not is_still:  # the wheel without a key scrolls the page
        zoom = alt.selection_interval(bind="scales", encodings=["x"], name="zoom", zoom="wheel![event.shiftKey]")
        params.append(zoom)
    few = max(len(line.x) for line in chart.lines) <= 30
    x, y = alt.X("x:Q", title=chart.x_title, scale=_across(chart.log_x)), alt.Y("y:Q", title=chart.y_title)
    y = y.scale(alt.Scale(type="log") if chart.log_y else alt.Scale(zero=False))
    places = sorted({place for line in chart.lines for place in line.x})
    if chart.log_x and len(places) <= 10:  # such as learning rates, or numbers of GPUs
        x = x.axis(values=places, format="~g", labelOverlap=True)
    lines = (
        alt.Chart(alt.Data(values=rows))
        .mark_line(point=alt.OverlayMarkDef(size=28, filled=True) if few else False, strokeWidth=1.8, clip=True)
        .encode(
            x=x,
            y=y,
            color=alt.Color("label:N", title=None, scale=_colors(labels)).legend(_legend(labels)),
            detail="name:N",
            opacity=faded,
            tooltip=_tips(("name:N", "line"), ("x:Q", chart.x_title), ("y:Q", chart.y_title)),
        )
        .add_params(*params)
    )
    layers: list[Any] = [lines]
    if chart.diagonal:
        values = [
            v for line in chart.lines for v in (*line.x, *line.y) if math.isfinite(v) and (v > 0 or not chart.log_y)
        ]
        ends = [{"x": v, "y": v} for v in (min(values, default=0.0), max(values, default=1.0))]
        diagonal = alt.Chart(alt.Data(values=ends)).mark_line(strokeDash=[5, 4], color=_NEUTRAL)
        layers.insert(0, diagonal.encode(x="x:Q", y="y:Q"))
    notes = [
        {"x": _finite(x), "y": _finite(y), "note": note}
        for line in chart.lines
        for x, y, note in zip(line.x, line.y, line.notes, strict=False)
    ]
    if notes:
        texts = alt.Chart(alt.Data(values=notes)).mark_text(dy=-10, fontSize=10, color=_NEUTRAL)
        layers.append(texts.encode(x="x:Q", y="y:Q", text="note:N"))
    return alt.layer(*layers).properties(height=_HEIGHT)


def _bars(chart: BarChart, is_still: bool) -> alt.LayerChart:
    labels = list(chart.series)
    rows = [
        {"name": name, "label": label, "y": _finite(values[i])}
        for label, values in chart.series.items()
        for i, name in enumerate(chart.names)
    ]
    several = len(labels) > 1
    params, faded = _fading(is_still or not several, 1.0, 0.15)
    # Names that are too long to fit side by side are slanted, so that none is left out.
    is_long = sum(map(len, chart.names)) > 60 and len(chart.names) <= MOST_SLANTED
    is_long |= is_still and max(map(len, chart.names)) > 4
    axis = alt.Axis(labelAngle=-45 if is_long else 0, labelOverlap=not is_long, labelLimit=140)
    bars = alt.Chart(alt.Data(values=rows)).mark_bar()
    bars = bars.encode(
        x=alt.X("name:N", title=chart.x_title, sort=list(chart.names), axis=axis),
        y=alt.Y("y:Q", title=chart.y_title),
        color=alt.Color("label:N", title=None, scale=_colors(labels)) if several else alt.value(PALETTE[0]),
        opacity=faded,
        tooltip=_tips(("name:N", chart.x_title), ("label:N", "series"), ("y:Q", chart.y_title)),
    )
    if several:
        bars = bars.encode(xOffset=alt.XOffset("label:N", sort=labels))
    layers: list[Any] = [bars.add_params(*params)]
    if chart.line is not None:
        rule = alt.Chart(alt.Data(values=[{"y": chart.line}])).mark_rule(strokeDash=[5, 4], color=_NEUTRAL)
        layers.append(rule.encode(y="y:Q"))
    return alt.layer(*layers).properties(height=_HEIGHT)


def _heatmap(chart: HeatmapChart, is_still: bool) -> alt.LayerChart:
    names, columns = _different(chart.rows), _different(chart.columns)
    rows: list[dict[str, Any]] = [
        {"row": r, "column": c, "value": float(f"{v:.4g}")}
        for r, own in zip(names, chart.values, strict=True)
        for c, v in zip(columns, own, strict=True)
        if math.isfinite(v)
    ]
    longest = max(map(len, chart.columns))
    angle = 0 if longest <= 4 else -90 if len(columns) > MOST_NUMBERED else -45
    limit = 260 if is_still else 140
    x = alt.X("column:N", title=chart.column_title, sort=columns)
    x = x.axis(labelOverlap=angle == 0, labelAngle=angle, labelLimit=limit)
    y = alt.Y("row:N", title=None, sort=names).axis(labelLimit=limit)
    base = alt.Chart(alt.Data(values=rows)).encode(x=x, y=y)
    tooltip = _tips(("row:N", chart.row_title), ("column:N", chart.column_title), ("value:Q", chart.value_title))
    scale = alt.Scale(scheme="cividis", domain=[0, chart.shown_top], clamp=True)
    cells = base.mark_rect().encode(color=alt.Color("value:Q", title=chart.value_title, scale=scale), tooltip=tooltip)
    layers: list[Any] = [cells]
    if len(columns) <= MOST_NUMBERED:
        bright = f"datum.value > {0.6 * chart.shown_top}"
        layers.append(
            base.mark_text(fontSize=10, aria=False).encode(
                text=alt.Text("value:Q", format=".0f"),
                color=alt.condition(bright, alt.value("black"), alt.value("white")),
            )
        )
    return alt.layer(*layers).properties(height=20 * len(names))


def _words(words: Words, is_still: bool) -> alt.LayerChart:
    """Plot the labels of words, one row per word and one column per layer; a page shows them as text."""
    names, colors = _different(words.words), expert_colors(words.num_colors)
    rows = []
    for layer, labels in words.labels.items():
        for name, label in zip(names, labels, strict=True):
            color = color_of(label, colors) or "#ffffff"
            cell = {"word": name, "layer": layer, "label": label or "\N{MULTIPLICATION SIGN}"}
            rows.append({**cell, "color": color, "ink": ink_on(color)})
    x = alt.X("layer:N", title=None, sort=list(words.labels)).axis(orient="top", labelAngle=-45)
    base = alt.Chart(alt.Data(values=rows)).encode(x=x, y=alt.Y("word:N", title=None, sort=names).axis(labelLimit=260))
    cells = base.mark_rect(stroke="white").encode(color=alt.Color("color:N", scale=None))
    texts = base.mark_text(fontSize=10).encode(text="label:N", color=alt.Color("ink:N", scale=None))
    return alt.layer(cells, texts).properties(height=20 * len(names))


def _different(names: Sequence[str]) -> list[str]:
    """Return names that look the same, and are all different."""
    seen: Counter[str] = Counter()
    different = []
    for name in names:
        different.append(name + "\N{ZERO WIDTH SPACE}" * seen[name])
        seen[name] += 1
    return different


def _tips(*fields: tuple[str, str]) -> list[alt.Tooltip]:
    """Return the tooltips of a mark, given fields with their titles."""
    return [
        alt.Tooltip(field, title=title, **({"format": ".4~g"} if field.endswith(":Q") else {}))
        for field, title in fields
    ]


def _finite(value: float | None) -> float | None:
    """Return a number to seven digits, which is short; None for NaN and infinity, which JSON does not have."""
    return float(f"{value:.7g}") if value is not None and math.isfinite(value) else None


def _legend(labels: Sequence[str]) -> alt.Legend | None:
    """Return a legend of the usual form; None if there is nothing to tell apart."""
    return alt.Legend() if len(labels) > 1 else None


def _across(is_log: bool, **options: Any) -> alt.Scale:
    """Return the scale of a horizontal axis; a logarithmic one may not speak of zero."""
    return alt.Scale(nice=False, **options, **({"type": "log"} if is_log else {"zero": False}))


def _colors(labels: Sequence[str]) -> alt.Scale:
    return alt.Scale(domain=list(labels), range=[PALETTE[i % len(PALETTE)] for i in range(len(labels))])


_DRAW: Mapping[type, Callable[[Any, bool], Any]] = {
    ScatterChart: _scatter,
    LineChart: _lines,
    BarChart: _bars,
    HeatmapChart: _heatmap,
    Words: _words,
}

# Texts and lines have the color of the page around them, light or dark.
_TEXT = {"labelColor": "currentColor", "titleColor": "currentColor"}
_CONFIG: Mapping[str, Any] = {
    "background": "transparent",
    "font": "system-ui, sans-serif",
    "view": {"stroke": None},
    "axis": {**_TEXT, "domainColor": "currentColor", "tickColor": "currentColor", "gridColor": "currentColor",
             "gridOpacity": 0.12, "domainOpacity": 0.4, "tickOpacity": 0.4, "titleFontWeight": "normal"},
    "legend": {**_TEXT, "orient": "bottom", "columns": 2, "labelLimit": 240, "titleFontWeight": "normal",
               "titleLimit": 320},
}  # fmt: skip
_STILL: Mapping[str, Any] = {
    "background": "white",
    "padding": 12,
    "font": "DejaVu Sans, Noto Sans, Noto Sans CJK SC, sans-serif",
    "view": {"stroke": None},
    "title": {"fontSize": 12, "fontWeight": "normal", "subtitleColor": "#555", "subtitleFontSize": 10},
    "axis": {"gridOpacity": 0.4, "titleFontWeight": "normal"},
    "legend": {"titleFontWeight": "normal", "titleLimit": 320, "labelLimit": 320},
}
