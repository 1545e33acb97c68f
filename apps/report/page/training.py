"""The course of a training, from a run's ``metrics.csv``: its losses, its validation, and the load of its experts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from apps.report.page.charts import Line, LineChart
from apps.report.page.parts import Part, Section, Text
from apps.report.routed import layer_names
from apps.report.tables import is_share
from apps.train.watch.logs import read_rows

_ROUTING = {
    "load_imbalance": ("Load imbalance", "most loaded expert over the mean", ""),
    "load_entropy": ("Entropy of the load", "entropy over log E; 1 is even", ""),
    "entropy": ("Entropy of the router's scores", "entropy over log E; 0 is certain", ""),
    "drop_rate": ("Dropped pairs", "share of the routed pairs", "No routed pair was dropped."),
    "dead_experts": ("Dead experts", "experts without a token", "No expert was without a token."),
}
"""The figures of a layer: the title of its chart, its axis, and what is said where it is always 0."""


def training_section(metrics: Path, title: str = "Training") -> Section:
    """Return losses and validation figures over the steps, and below them the routing of each layer.

    Args:
        metrics: a run's ``metrics.csv``; without one the section is empty.
        title: its heading.
    """
    rows = read_rows(metrics)
    columns = {name: _points(rows, name) for name in (rows[0] if rows else ())}
    columns = {name: points for name, points in columns.items() if points}
    parts: list[Part] = []
    losses = {name: columns[f"{name}/loss"] for name in ("train", "val") if f"{name}/loss" in columns}
    if losses:
        parts.append(_chart("Loss", "loss", losses))
    kinds = {name: name.removeprefix("val/") for name in columns if name.startswith("val/") and name.count("/") == 1}
    own = {short: columns[name] for name, short in kinds.items() if short != "loss"}
    shares = {name: p for name, p in own.items() if is_share(name, [[y for _, y in p]])}
    others = {name: p for name, p in own.items() if name not in shares}
    groups = [shares, *({name: p} for name, p in others.items())]
    parts += [_chart(f"Validation: {', '.join(group)}", "value", group) for group in groups if group]
    # A training of fewer steps than the log's interval only has the figures of its validations.
    parts += _routing_parts(columns, "routing", "training") or _routing_parts(columns, "val/routing", "validation")
    return Section(title, tuple(parts))


def _routing_parts(columns: Mapping[str, Sequence[tuple[int, float]]], prefix: str, of: str) -> list[Part]:
    """Return a chart for each figure of the routing, one line per layer, and a text for figures that stay 0.

    Args:
        columns: the points of each column of the log.
        prefix: prefix of the names of the columns.
        of: stage of the columns, for the titles.
    """
    charts: list[Part] = []
    never: list[str] = []
    for figure, (title, axis, without) in _ROUTING.items():
        by_layer = {}
        for name, points in columns.items():
            layer, _, last = name.removeprefix(f"{prefix}/").rpartition("/")
            if name.startswith(f"{prefix}/") and layer and last == figure:
                by_layer[layer] = points
        by_layer = dict(zip(layer_names(list(by_layer)), by_layer.values(), strict=True))
        if by_layer and without and all(y == 0 for points in by_layer.values() for _, y in points):
            never.append(without)
        elif by_layer:
            charts.append(_chart(f"{title} in {of}", axis, by_layer))
    return [*charts, Text(tuple(never))] if never else charts


def _points(rows: Sequence[Mapping[str, str]], name: str) -> list[tuple[int, float]]:
    points = [(int(row["step"]), float(row[name])) for row in rows if row.get(name)]
    return [(step, value) for step, value in points if math.isfinite(value)]


def _chart(title: str, axis: str, lines: Mapping[str, Sequence[tuple[int, float]]]) -> LineChart:
    drawn = tuple(
        Line(name, tuple(float(step) for step, _ in points), tuple(value for _, value in points))
        for name, points in lines.items()
    )
    ends = "; ".join(f"{line.label} from {line.y[0]:.4g} to {line.y[-1]:.4g}" for line in drawn[:6])
    return LineChart(title, f"Over optimizer steps: {ends}.", "step", axis, drawn)
