"""Pictures for any app: the load of experts, quality against cost, and parts that all pictures share.

Each function turns plain arrays into a matplotlib ``Figure`` and touches no global state: no pyplot, no display.
``save_picture`` writes it. Colours are Okabe and Ito's, which people with colour-blindness can tell apart; where an
expert is a colour its number is written as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from apps.base.files import replacing

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito, "Color Universal Design" (2008), the pale ones last; black is kept for lines.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999")
MARKERS = "osD^vPX*"

MOST_NUMBERED = 16
"""Columns up to which each one has its name, and each cell its number."""


@dataclass(frozen=True)
class Series:
    """The points of one kind of model in ``quality_against_flops``.

    Attributes:
        label: its name in the legend.
        flops: FLOPs of one example, one value a point.
        quality: same length, higher is better.
        interval: half widths of 95 % intervals, same length; None draws none.
        connected: join the points by a line, as for a sweep.
    """

    label: str
    flops: Sequence[float]
    quality: Sequence[float]
    interval: Sequence[float] | None = None
    connected: bool = False


def expert_colors(num_experts: int) -> list[str]:
    """Return a hex colour for each expert: the palette's up to 8, beyond it those of a map of rising lightness."""
    if num_experts <= len(PALETTE):
        return list(PALETTE[:num_experts])
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    # A stride near the golden ratio puts neighbours in number far apart in colour.
    order = np.argsort((np.arange(num_experts) * 0.618034) % 1.0, kind="stable")
    return [to_hex(c) for c in colormaps["viridis"](np.linspace(0.05, 0.98, num_experts))[order]]


def load_bars(
    tokens_per_expert: Mapping[str, np.ndarray],
    drop_rate: Mapping[str, float] | None = None,
    title: str = "Load of the experts",
    share_of: str = "routed pairs",
    names: Mapping[str, Sequence[str]] | None = None,
) -> Figure:
    """Draw the share of the routed pairs that each expert of a layer computes, beside the even share.

    Args:
        tokens_per_expert: layer name to (E,) counts.
        drop_rate: layer name to the share of pairs no expert computed; written above the bars.
        title: title of the picture.
        share_of: meaning of the counts, for the vertical axis.
        names: layer name to the names of its experts; None: they are numbers.
    """
    num_experts = max(len(v) for v in tokens_per_expert.values())
    fig = new_picture(max(2.6, 0.24 * num_experts + 1.0) * len(tokens_per_expert) + 0.9, 2.9)
    axes = fig.subplots(1, len(tokens_per_expert), squeeze=False, sharey=True)[0]
    for axis, (name, counts) in zip(axes, tokens_per_expert.items(), strict=True):
        counts = np.asarray(counts, dtype=np.float64)
        share = 100 * counts / max(counts.sum(), 1.0)
        even = 100 / len(counts)
        axis.bar(range(len(counts)), share, color=PALETTE[0], width=0.8)
        axis.axhline(even, color="black", linewidth=1, linestyle="--", label=f"even: {even:.3g} %")
        note = f"max/mean {share.max() / even:.2f}"
        if drop_rate is not None:
            note += f", dropped {100 * drop_rate[name]:.2g} %"
        axis.set_title(f"{name}\n{note}", fontsize=9)
        own = [str(e) for e in range(len(counts))] if names is None else names[name]
        name_columns(axis, own)
        if all(n.isdigit() for n in own):
            axis.set_xlabel("expert")
        clean_axis(axis)
    axes[0].set_ylabel(f"share of {share_of}, %")
    axes[0].set_ylim(0, 1.22 * axes[0].get_ylim()[1])
    axes[0].legend(fontsize=8, frameon=False, loc="upper left")
    fig.suptitle(title, fontsize=11)
    return fig


def quality_against_flops(
    series: Sequence[Series],
    quality: str = "test accuracy",
    title: str = "Quality against cost",
    percent: bool = True,
    unit: str = "an example",
) -> Figure:
    """Draw quality over the FLOPs of one example, one marker a series; lone points of equal FLOPs stand side by side.

    Args:
        series: the models.
        quality: name of the vertical axis.
        title: title of the picture.
        percent: qualities are shares in 0..1 and drawn in %.
        unit: the example that the FLOPs are counted for, such as "an image".
    """
    flops = [f for s in series for f in s.flops]
    scale, prefix = _flop_unit(max(flops))
    factor = 100.0 if percent else 1.0
    fig = new_picture(6.0, 3.9)
    axis = fig.subplots()
    for index, s in enumerate(series):
        drawn = axis.errorbar(
            np.asarray(s.flops, dtype=np.float64) / scale,
            factor * np.asarray(s.quality, dtype=np.float64),
            yerr=None if s.interval is None else factor * np.asarray(s.interval, dtype=np.float64),
            label=s.label,
            color=PALETTE[index % len(PALETTE)],
            marker=shape_of(index, MARKERS),
            linestyle="-" if s.connected else "none",
            markersize=6,
            linewidth=1.5,
            capsize=3,
        )
        _set_beside(fig, drawn.get_children(), _among_equals(series, s))
    if min(flops) > 0 and max(flops) / min(flops) > 20:
        axis.set_xscale("log")
    axis.margins(0.08)
    if percent:  # an interval may reach beyond 0 or 100
        low, high = axis.get_ylim()
        axis.set_ylim(max(low, -1.0), min(high, 101.0))
    axis.set_xlabel(f"{prefix}FLOPs {unit}, forward")
    axis.set_ylabel(f"{quality}, %" if percent else quality)
    axis.grid(alpha=0.25)
    axis.legend(fontsize=8, frameon=False, loc="best")
    clean_axis(axis)
    fig.suptitle(title, fontsize=11)
    return fig


def _among_equals(series: Sequence[Series], own: Series) -> float:
    """Return the place of a lone point among those of the same FLOPs: 0 in the middle, steps of 1."""
    if len(own.flops) != 1:
        return 0.0
    equals = [s for s in series if len(s.flops) == 1 and abs(s.flops[0] - own.flops[0]) <= 0.01 * own.flops[0]]
    return next(i for i, s in enumerate(equals) if s is own) - (len(equals) - 1) / 2


def _set_beside(fig: Figure, artists: Sequence[Artist], place: float) -> None:
    """Move artists sideways by ``place`` times 7 points, so that intervals of equal FLOPs do not overlap."""
    from matplotlib.transforms import ScaledTranslation

    if place:
        for artist in artists:
            artist.set_transform(artist.get_transform() + ScaledTranslation(7 * place / 72, 0, fig.dpi_scale_trans))


def save_picture(fig: Figure, path: Path) -> Path:
    """Write ``fig`` as PNG, whole or not at all, and make its folder; return the path."""
    with replacing(path, "wb") as file:
        fig.savefig(file, format="png", dpi=150, facecolor="white")
    return path


def shape_of(place: int, shapes: Sequence[str]) -> str:
    """Return the shape of the points at a place among several, so that two of one colour of ``PALETTE`` have two."""
    return shapes[(place + place // len(PALETTE)) % len(shapes)]


def new_picture(width: float, height: float) -> Figure:
    """Return an empty picture of this size in inches, whose parts keep clear of each other."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    fig = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(fig)
    return fig


def name_columns(axis: Axes, names: Sequence[str]) -> None:
    """Write the names below, turned where they are long, and not all of many."""
    stride = 1 if len(names) <= MOST_NUMBERED else max(1, len(names) // 16)
    shown = range(0, len(names), stride)
    turned = max(len(n) for n in names) > 4
    style: dict[str, Any] = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if turned else {}
    axis.set_xticks(shown, [names[i] for i in shown], fontsize=8, **style)


def clean_axis(axis: Axes) -> None:
    """Take away the upper and the right line of a frame."""
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def _flop_unit(largest: float) -> tuple[float, str]:
    for scale, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if largest >= scale:
            return scale, unit
    return 1.0, ""
