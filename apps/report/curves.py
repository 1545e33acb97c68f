"""Curves of a run's ``metrics.csv`` over the steps of its training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from apps.report.plots import PALETTE, clean_axis, new_picture
from apps.train.logs import read_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Curve:
    """One value over the steps of a training.

    Attributes:
        label: its name in the legend.
        steps: optimizer steps at which it was logged, ascending.
        values: one value for each step.
    """

    label: str
    steps: np.ndarray
    values: np.ndarray


def read_curves(metrics: Path, panels: Mapping[str, Mapping[str, str]]) -> dict[str, list[Curve]]:
    """Return the curves of each panel that a run's ``metrics.csv`` has; a panel without any is left out.

    Args:
        metrics: the file; there may be none.
        panels: title of a panel to the columns of its curves by label.
    """
    rows = read_rows(metrics)
    curves: dict[str, list[Curve]] = {}
    for panel, columns in panels.items():
        for label, column in columns.items():
            points = [(int(row["step"]), float(row[column])) for row in rows if row.get(column)]
            if points:
                steps, values = zip(*points, strict=True)
                curves.setdefault(panel, []).append(Curve(label, np.array(steps), np.array(values)))
    return curves


def learning_curves(panels: Mapping[str, Sequence[Curve]], title: str, best: str | None = None) -> Figure:
    """Draw a panel for each quantity, over optimizer steps.

    A curve of over 200 values is drawn pale, with the mean of each 100th part of it over that.

    Args:
        panels: title of a panel to its curves, at least one.
        title: title of the picture.
        best: label of the curves whose highest value is marked and stands in the legend.
    """
    fig = new_picture(3.5 * len(panels) + 0.3, 3.1)
    for axis, (name, curves) in zip(fig.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for number, curve in enumerate(curves):
            label = curve.label
            if label == best and np.isfinite(curve.values).any():
                at = int(np.nanargmax(curve.values))
                label = f"{label}, best {curve.values[at]:.1f}"
                axis.plot(curve.steps[at], curve.values[at], "o", color="black", markersize=4, zorder=3)
            _curve(axis, curve, PALETTE[number % len(PALETTE)], label)
        axis.set_xlabel("step", fontsize=9)
        axis.set_title(name, fontsize=10)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25)
        axis.legend(fontsize=8, frameon=False, loc="best")
        clean_axis(axis)
    fig.suptitle(title, fontsize=11)
    return fig


def _curve(axis: Axes, curve: Curve, color: str, label: str) -> None:
    lone = "o" if len(curve.values) == 1 else None
    if len(curve.values) <= 200:
        axis.plot(curve.steps, curve.values, color=color, linewidth=1.5, marker=lone, label=label)
        return
    axis.plot(curve.steps, curve.values, color=color, linewidth=0.6, alpha=0.3)
    steps, values = ([part.mean() for part in np.array_split(x, 100)] for x in (curve.steps, curve.values))
    axis.plot(steps, values, color=color, linewidth=1.5, label=label)
