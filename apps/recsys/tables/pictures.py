"""Pictures of a multi-task model: how its experts are used by its gates, and how true its predictions are.

Each function turns plain arrays into a matplotlib ``Figure``, as in ``apps.report.plots``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from apps.recsys.binary_metrics import Calibration
from apps.report.plots import MOST_NUMBERED, PALETTE, clean_axis, name_columns, new_picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class BlockUse:
    """The experts of one block, for ``polarisation``.

    Attributes:
        title: title of the block; "" for none.
        experts: names of the experts.
        zero_share: share of each expert's outputs that is zero; NaN where they are not seen.
        weights: mean weight of each expert, by gate; NaN for experts that the gate does not reach.
        entropy: (mean entropy of an example's weights, entropy of the mean weights) over log E, by gate.
    """

    title: str
    experts: tuple[str, ...]
    zero_share: np.ndarray
    weights: Mapping[str, np.ndarray]
    entropy: Mapping[str, tuple[float, float]]


def polarisation(blocks: Sequence[BlockUse], collapsed: float, title: str = "Expert polarisation") -> Figure:
    """Draw a row for each block: zero outputs by expert, the gates' weights by expert, and how decided the gates are.

    Args:
        blocks: at least one.
        collapsed: share of zeros from which an expert has collapsed; a line.
        title: of the picture.

    Raises:
        ValueError: no block.
    """
    if not blocks:
        raise ValueError("polarisation needs at least one block")
    most = max(len(b.experts) for b in blocks)
    wide = min(4.6, max(2.6, 0.33 * most + 0.8))
    named = max(len(n) for b in blocks for n in b.experts) if most <= MOST_NUMBERED else 3
    fig = new_picture(2 * wide + 3.2, (2.3 + 0.06 * named) * len(blocks) + 0.9)
    axes = fig.subplots(len(blocks), 3, squeeze=False, gridspec_kw={"width_ratios": [wide, wide, 2.6]})
    gates = list(dict.fromkeys(name for b in blocks for name in b.weights))
    colors = {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(gates)}
    for (zeros, shares, decided), block in zip(axes, blocks, strict=True):
        heading = f"{block.title}: " if block.title else ""
        _zero_bars(zeros, block, collapsed, heading)
        _weight_bars(shares, block, colors, heading)
        _entropy_bars(decided, block, colors, heading)
    handles, names = [], []
    for axis in axes[:, 1]:
        for handle, name in zip(*axis.get_legend_handles_labels(), strict=True):
            if name not in names:
                handles.append(handle)
                names.append(name)
    fig.legend(handles, names, loc="outside lower center", ncols=min(4, len(names)), fontsize=8, frameon=False)
    fig.suptitle(title, fontsize=11)
    return fig


def _zero_bars(axis: Axes, block: BlockUse, collapsed: float, heading: str) -> None:
    places = np.arange(len(block.experts))
    axis.set_title(f"{heading}outputs that are zero", fontsize=9)
    if np.isfinite(block.zero_share).any():
        axis.bar(places, 100 * np.nan_to_num(block.zero_share), color="#777777", width=0.75)
    else:
        axis.text(0.5, 0.5, "summed in the kernel,\nnot seen", transform=axis.transAxes, ha="center", va="center")
    axis.axhline(100 * collapsed, color="black", linewidth=1, linestyle="--")
    axis.text(1.0, 100 * collapsed - 2, "collapsed", transform=axis.get_yaxis_transform(), ha="right", va="top", size=7)
    axis.set_ylim(0, 100)
    axis.set_ylabel("zero, %")
    name_columns(axis, block.experts)
    clean_axis(axis)


def _weight_bars(axis: Axes, block: BlockUse, colors: Mapping[str, str], heading: str) -> None:
    """Draw how much of an expert's weight each gate makes up, stacked."""
    bottom = np.zeros(len(block.experts))
    for name, weight in block.weights.items():
        height = 100 * np.nan_to_num(weight)
        axis.bar(range(len(block.experts)), height, bottom=bottom, color=colors[name], width=0.75, label=name)
        bottom += height
    axis.set_title(f"{heading}mean weight of the gates, stacked", fontsize=9)
    axis.set_ylabel("weight, %")
    name_columns(axis, block.experts)
    clean_axis(axis)


def _entropy_bars(axis: Axes, block: BlockUse, colors: Mapping[str, str], heading: str) -> None:
    names = list(block.entropy)
    places = np.arange(len(names))
    example, mean = (np.array([block.entropy[n][i] for n in names]) for i in (0, 1))
    axis.bar(places, example, color=[colors[n] for n in names], width=0.7)
    axis.scatter(places, mean, marker="_", s=160, color="black", zorder=3)
    axis.set_ylim(0, 1.05)
    axis.set_ylabel("entropy / log E")
    axis.set_title(f"{heading}gate entropy\n(line: of the mean weights)", fontsize=9)
    name_columns(axis, names)
    clean_axis(axis)


def calibration_curves(curves: Mapping[str, Calibration], title: str = "Calibration") -> Figure:
    """Draw for each task the share of positives over the mean prediction, by bins; a dot is as large as its bin.

    Both axes are logarithmic where most predictions are below 5 %: what matters would else lie in one corner.

    Raises:
        ValueError: no task.
    """
    if not curves:
        raise ValueError("calibration_curves needs at least one task")
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
    fig.suptitle(title, fontsize=11)
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
