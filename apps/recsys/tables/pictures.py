"""Pictures of a multi-task model: how its experts are used by its gates, and how true its predictions are.

Each function returns a matplotlib ``Figure``, as in ``apps.report.plots``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from apps.recsys.binary_metrics import Calibration
from apps.recsys.tables.gating import COLLAPSED, ExpertUse, Gate
from apps.report.plots import MOST_NUMBERED, PALETTE, clean_axis, name_columns, new_picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def polarisation(use: Sequence[ExpertUse], gates: Sequence[Gate]) -> Figure:
    """Draw a row for each block: zero outputs by expert, the gates' weights by expert, and how decided the gates are.

    Args:
        use: the experts of all blocks.
        gates: their gates, at least one.
    """
    from matplotlib.patches import Patch

    blocks = list(dict.fromkeys(g.block for g in gates))
    experts = {block: [u for u in use if u.block == block] for block in blocks}
    most = max(map(len, experts.values()))
    wide = min(4.6, max(2.6, 0.33 * most + 0.8))
    named = max(len(u.label) for u in use) if most <= MOST_NUMBERED else 3
    fig = new_picture(2 * wide + 3.2, (2.3 + 0.06 * named) * len(blocks) + 0.9)
    axes = fig.subplots(len(blocks), 3, squeeze=False, gridspec_kw={"width_ratios": [wide, wide, 2.6]})
    labels = dict.fromkeys(g.label for g in gates)
    colors = {label: PALETTE[i % len(PALETTE)] for i, label in enumerate(labels)}
    for (zeros, shares, decided), block in zip(axes, blocks, strict=True):
        heading = f"{block}: " if block else ""
        own = [g for g in gates if g.block == block]
        _zero_bars(zeros, experts[block], heading)
        _weight_bars(shares, experts[block], own, colors, heading)
        _entropy_bars(decided, own, colors, heading)
    handles = [Patch(color=color, label=label) for label, color in colors.items()]
    fig.legend(handles=handles, loc="outside lower center", ncols=min(4, len(handles)), fontsize=8, frameon=False)
    fig.suptitle("Expert polarisation", fontsize=11)
    return fig


def _zero_bars(axis: Axes, use: Sequence[ExpertUse], heading: str) -> None:
    zero_share_E = np.array([u.zero_share for u in use])
    axis.set_title(f"{heading}outputs that are zero", fontsize=9)
    if np.isfinite(zero_share_E).any():
        axis.bar(range(len(use)), 100 * np.nan_to_num(zero_share_E), color="#777777", width=0.75)
    else:
        axis.text(0.5, 0.5, "summed in the kernel,\nnot seen", transform=axis.transAxes, ha="center", va="center")
    line = 100 * COLLAPSED
    axis.axhline(line, color="black", linewidth=1, linestyle="--")
    axis.text(1.0, line - 2, "collapsed", transform=axis.get_yaxis_transform(), ha="right", va="top", size=7)
    axis.set_ylim(0, 100)
    axis.set_ylabel("zero, %")
    name_columns(axis, [u.label for u in use])
    clean_axis(axis)


def _weight_bars(
    axis: Axes, use: Sequence[ExpertUse], gates: Sequence[Gate], colors: Mapping[str, str], heading: str
) -> None:
    """Draw how much of an expert's weight each gate makes up, stacked."""
    bottom = np.zeros(len(use))
    for gate in gates:
        height = 100 * np.nan_to_num([u.weights[gate.label] for u in use])
        axis.bar(range(len(use)), height, bottom=bottom, color=colors[gate.label], width=0.75)
        bottom += height
    axis.set_title(f"{heading}mean weight of the gates, stacked", fontsize=9)
    axis.set_ylabel("weight, %")
    name_columns(axis, [u.label for u in use])
    clean_axis(axis)


def _entropy_bars(axis: Axes, gates: Sequence[Gate], colors: Mapping[str, str], heading: str) -> None:
    places = range(len(gates))
    axis.bar(places, [g.entropy for g in gates], color=[colors[g.label] for g in gates], width=0.7)
    axis.scatter(places, [g.mean_entropy for g in gates], marker="_", s=160, color="black", zorder=3)
    axis.set_ylim(0, 1.05)
    axis.set_ylabel("entropy / log E")
    axis.set_title(f"{heading}gate entropy\n(line: of the mean weights)", fontsize=9)
    name_columns(axis, [g.label for g in gates])
    clean_axis(axis)


def calibration_curves(curves: Mapping[str, Calibration]) -> Figure:
    """Draw for each task the share of positives over the mean prediction, by bins; a dot is as large as its bin.

    Both axes are logarithmic where most predictions are below 5 %: what matters would else lie in one corner.
    """
    columns = min(3, len(curves))
    rows = -(-len(curves) // columns)
    fig = new_picture(2.9 * columns + 0.5, 3.25 * rows + 0.45)
    axes = fig.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes[len(curves) :]:
        axis.set_visible(False)
    for axis, (task, bins) in zip(axes, curves.items(), strict=False):
        _calibration_panel(axis, bins)
        axis.set_title(f"{task} (ECE {100 * bins.error:.2f} %)", fontsize=9)
    for axis in axes[: len(curves)]:
        axis.set_xlabel("mean prediction, %")
    for axis in axes[::columns]:
        axis.set_ylabel("positive, %")
    fig.suptitle("Calibration", fontsize=11)
    return fig


def _calibration_panel(axis: Axes, bins: Calibration) -> None:
    x, y = 100 * bins.prediction, 100 * bins.positives
    rare = len(x) > 0 and float(np.average(x < 5, weights=bins.counts)) > 0.5
    high = max(float(np.max(x, initial=1.0)), float(np.max(y, initial=1.0)))
    if rare:
        low = max(min(float(np.min(v[v > 0], initial=1.0)) for v in (x, y)), 1e-4) / 1.6
        axis.set_xscale("log")
        axis.set_yscale("log")
        high *= 1.6
        # Bins without a positive example stand on the lower edge.
        x, y = np.maximum(x, low), np.maximum(y, low)
    else:
        low, high = -0.03 * high, 1.03 * high
    axis.plot([low, high], [low, high], color="black", linewidth=1, linestyle="--")
    sizes = 8 + 22 * bins.counts / max(int(bins.counts.max(initial=1)), 1)
    axis.plot(x, y, color=PALETTE[0], linewidth=1.2)
    axis.scatter(x, y, s=sizes, color=PALETTE[0], clip_on=False, zorder=3)
    axis.set_xlim(low, high)
    axis.set_ylim(low, high)
    axis.set_box_aspect(1)
    axis.grid(alpha=0.25)
    axis.tick_params(labelsize=8)
    clean_axis(axis)
