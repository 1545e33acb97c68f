"""Quality against what it costs, and the front of the points that no other beats: one picture."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from apps.report.plots import MARKERS, PALETTE, clean_axis, new_picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


_DIRECTIONS = ((0, 1), (0, -1), (1, 0), (-1, 0), (1, 1), (1, -1), (-1, 1), (-1, -1))
"""Places of a label beside its point, the best first: to the right, and up."""


@dataclass(frozen=True)
class Weighed:
    """A point: a quality, and what it costs.

    Attributes:
        kind: its series, which has a colour, a marker and a line.
        label: what is written beside it.
        quality: its quality.
        costs: its costs, one a panel; None: it has none there.
        intervals: ends of their intervals; None: they have none.
    """

    kind: str
    label: str
    quality: float
    costs: tuple[float | None, ...]
    intervals: tuple[tuple[float, float] | None, ...]


def front(quality: Sequence[float], cost: Sequence[float | None], higher: bool) -> list[int]:
    """Return the points on the Pareto front, by rising cost: no other point is as good in both, and better in one.

    Args:
        quality: of each point.
        cost: of each point; the less the better. A point without a cost is on no front.
        higher: whether a higher quality is better.

    Example::

        front([0.9, 0.8, 0.7, 0.8], [3, 2, 2, None], higher=True)      # [1, 0]: point 2 costs as 1 does, and is worse
    """
    sign = 1.0 if higher else -1.0
    points = [(c, -sign * q, i) for i, (q, c) in enumerate(zip(quality, cost, strict=True)) if c is not None]
    kept: list[tuple[float, float, int]] = []
    for c, worse, i in sorted(points):
        if not kept or worse < kept[-1][1] or (c, worse) == kept[-1][:2]:
            kept.append((c, worse, i))
    return [i for *_, i in kept]


def quality_against_costs(
    points: Sequence[Weighed], titles: Sequence[str], quality: str, higher: bool, title: str
) -> Figure:
    """Draw the quality of points over each of their costs, side by side, with the front of each as steps.

    Args:
        points: the points, whose first one is drawn as a star: what the others are compared with.
        titles: names of the costs, with units.
        quality: name of the common vertical axis; up is better, so that one of less quality is turned.
        higher: whether a higher quality is better.
        title: title of the picture.
    """
    fig = new_picture(4.1 * len(titles) + 0.6, 5.2)
    axes = fig.subplots(1, len(titles), squeeze=False, sharey=True)[0]
    kinds = list(dict.fromkeys(point.kind for point in points))
    for panel, (axis, name) in enumerate(zip(axes, titles, strict=True)):
        costs = [point.costs[panel] for point in points]
        _draw_front(axis, points, costs, higher)
        for number, kind in enumerate(kinds):
            _draw_kind(axis, [p for p in points if p.kind == kind], panel, number)
        shown = [cost for cost in costs if cost is not None]
        if shown and min(shown) > 0 and max(shown) / min(shown) > 10:
            axis.set_xscale("log")
        axis.set_xlabel(name)
        axis.margins(0.16)
        axis.grid(alpha=0.25)
        clean_axis(axis)
    if not higher:
        axes[0].invert_yaxis()
    axes[0].set_ylabel(quality)
    handles, labels = axes[0].get_legend_handles_labels()
    fig.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 7), fontsize=8, frameon=False)
    fig.suptitle(title, fontsize=11)
    fig.draw_without_rendering()  # puts the axes in their places
    for panel, axis in enumerate(axes):
        _write_labels(axis, points, panel)
    return fig


def _draw_front(axis: Axes, points: Sequence[Weighed], costs: Sequence[float | None], higher: bool) -> None:
    """Draw the front as steps: at each cost the best quality that is had for it."""
    on = front([p.quality for p in points], costs, higher)
    x, y = [costs[i] or 0.0 for i in on], [points[i].quality for i in on]  # a point of the front has a cost
    axis.step(x, y, where="post", color="#999999", linewidth=5, alpha=0.4, zorder=1, label="Pareto front")
    axis.plot(
        x, y, linestyle="none", marker="o", markersize=13, markerfacecolor="none", markeredgecolor="#666666", zorder=1
    )


def _draw_kind(axis: Axes, own: Sequence[Weighed], panel: int, number: int) -> None:
    shown = [(point.costs[panel], point.quality, point.intervals[panel]) for point in own]
    placed = [(cost, quality, ends) for cost, quality, ends in shown if cost is not None]
    trained = number == 0
    color = "black" if trained else PALETTE[(number - 1) % len(PALETTE)]
    for cost, quality, ends in placed:
        if ends is not None:
            low, high = max(cost - ends[0], 0.0), max(ends[1] - cost, 0.0)
            axis.errorbar([cost], [quality], xerr=[[low], [high]], color=color, linewidth=1, alpha=0.5, zorder=2)
    axis.plot(
        [cost for cost, *_ in placed],
        [quality for _, quality, _ in placed],
        label=own[0].kind,
        color=color,
        marker="*" if trained else MARKERS[(number - 1) % len(MARKERS)],
        markersize=12 if trained else 6,
        linestyle="-" if len(placed) > 1 else "none",
        linewidth=1,
        zorder=4 if trained else 3,
    )


def _write_labels(axis: Axes, points: Sequence[Weighed], panel: int) -> None:
    """Write each label beside its point, where it covers the least of points and of the labels before it."""
    from matplotlib.transforms import Bbox

    placed = [(point, cost) for point in points if (cost := point.costs[panel]) is not None]
    pixels = axis.figure.dpi / 72  # type: ignore[union-attr]
    corners = axis.transData.transform([(cost, point.quality) for point, cost in placed])
    taken = [Bbox([(x - 5 * pixels, y - 5 * pixels), (x + 5 * pixels, y + 5 * pixels)]) for x, y in corners]
    inside = axis.get_window_extent()
    for (point, cost), (x, y) in zip(placed, corners, strict=True):
        text = axis.annotate(
            point.label,
            (cost, point.quality),
            xytext=(0, 0),
            textcoords="offset points",
            ha="center",
            va="center",
            fontsize=7,
            zorder=5,
        )
        text.set_in_layout(False)
        size = text.get_window_extent()
        best = None
        for far, (right, up) in itertools.product((7, 14, 22), _DIRECTIONS):
            # The nearest edge of the label, not its middle, is so far away.
            across, above = far * pixels * right + size.width / 2 * right, far * pixels * up + size.height / 2 * up
            box = Bbox.from_bounds(x + across - size.width / 2, y + above - size.height / 2, size.width, size.height)
            outside = box.x0 < inside.x0 or box.x1 > inside.x1 or box.y0 < inside.y0 or box.y1 > inside.y1
            overlaps = box.count_overlaps(taken) + outside
            if best is None or overlaps < best[0]:
                best = (overlaps, box, (across / pixels, above / pixels))
        assert best is not None
        text.set_position(best[2])
        taken.append(best[1])
