"""Pictures of a multi-task model: who uses which expert, for which values, how evenly, and how true predictions are.

Each function turns plain arrays into a matplotlib ``Figure``, as in ``apps.report.plots``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from apps.recsys.binary_metrics import Calibration
from apps.report.plots import PALETTE, clean_axis, new_picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WRITTEN = 16  # columns up to which each cell has its number


@dataclass(frozen=True)
class Heatmap:
    """One map.

    Attributes:
        title: of the map; "" for none.
        rows, columns: names.
        values: (rows, columns) shares in 0..1; NaN where there is nothing to show.
    """

    title: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: np.ndarray

    def __post_init__(self) -> None:
        if self.values.shape != (len(self.rows), len(self.columns)):
            raise ValueError(
                f"heatmap {self.title!r}: values {self.values.shape} for {len(self.rows)} x {len(self.columns)}"
            )


def heatmaps(maps: Sequence[Heatmap], title: str, of: str = "mean gate weight, %", below: bool = True) -> Figure:
    """Maps on one scale of colour, in percent.

    Args:
        maps: at least one.
        title: of the picture.
        of: what the colour says.
        below: one below another; else side by side, for maps of the same rows.

    Raises:
        ValueError: no map.
    """
    if not maps:
        raise ValueError("heatmaps needs at least one map")
    top = max((float(np.nanmax(m.values)) for m in maps if np.isfinite(m.values).any()), default=1.0) or 1.0
    cell = 0.42 if max(len(m.columns) for m in maps) <= _WRITTEN else 0.15
    label_width = 0.085 * max(len(r) for m in maps for r in m.rows)
    widths = [max(1.6, cell * len(m.columns)) for m in maps]
    heights = [max(0.7, 0.3 * len(m.rows)) for m in maps]
    name_height = 0.075 * max(len(c) for m in maps for c in m.columns)
    margin = 0.45 + name_height
    if below:
        fig = new_picture(max(4.6, max(widths) + label_width + 1.5), sum(h + margin for h in heights) + 0.6)
        axes = fig.subplots(len(maps), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    else:
        fig = new_picture(max(4.6, sum(widths) + 0.25 * len(maps) + label_width + 1.3), max(heights) + margin + 0.6)
        axes = fig.subplots(1, len(maps), squeeze=False, sharey=True, gridspec_kw={"width_ratios": widths})[0]
    image: Any = None
    for axis, m in zip(axes, maps, strict=True):
        image = axis.imshow(100 * m.values, aspect="auto", cmap="cividis", vmin=0.0, vmax=100 * top)
        axis.set_facecolor("#e8e8e8")
        axis.set_title(m.title, fontsize=9)
        name_columns(axis, m.columns)
        if below or axis is axes[0]:
            axis.set_yticks(range(len(m.rows)), m.rows, fontsize=8)
        else:
            axis.tick_params(labelleft=False)
        if len(m.columns) <= _WRITTEN:
            _write_cells(axis, m.values, top)
    fig.colorbar(image, ax=list(axes), label=of, pad=0.02, shrink=0.95, aspect=25 if below else 20)
    fig.suptitle(title, fontsize=11)
    return fig


def name_columns(axis: Axes, names: Sequence[str]) -> None:
    """Write the names below, turned where they are long, and not all of many."""
    stride = 1 if len(names) <= _WRITTEN else max(1, len(names) // 16)
    shown = range(0, len(names), stride)
    turned = max(len(n) for n in names) > 4
    style: dict[str, Any] = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if turned else {}
    axis.set_xticks(shown, [names[i] for i in shown], fontsize=8, **style)


def _write_cells(axis: Axes, values: np.ndarray, top: float) -> None:
    for (r, c), value in np.ndenumerate(values):
        if np.isfinite(value):
            color = "black" if value > 0.6 * top else "white"
            axis.text(c, r, f"{100 * value:.0f}", ha="center", va="center", fontsize=6.5, color=color)


@dataclass(frozen=True)
class BlockUse:
    """The experts of one block, for ``polarisation``.

    Attributes:
        title: of the block; "" for none.
        experts: names.
        zero_share: of each one's outputs; NaN where not seen.
        weights: by gate, its mean weight of each expert; NaN where it does not reach it.
        entropy: by gate, (mean entropy of an example's weights, entropy of the mean weights), over log E.
    """

    title: str
    experts: tuple[str, ...]
    zero_share: np.ndarray
    weights: Mapping[str, np.ndarray]
    entropy: Mapping[str, tuple[float, float]]


def polarisation(blocks: Sequence[BlockUse], collapsed: float, title: str = "Expert polarisation") -> Figure:
    """A row a block: zero outputs by expert, whose weight an expert has, and how decided the gates are.

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
    named = max(len(n) for b in blocks for n in b.experts) if most <= _WRITTEN else 3
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
    axis.set_ylim(0, 100)
    axis.set_ylabel("zero, %")
    name_columns(axis, block.experts)
    clean_axis(axis)


def _weight_bars(axis: Axes, block: BlockUse, colors: Mapping[str, str], heading: str) -> None:
    """Stacked: how much of an expert's weight each gate makes up."""
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
    """A panel a task: observed share of positives over the mean prediction, by bins; the size of a dot is its bin's.

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
        # What no positive example fell into stands on the lower edge.
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
