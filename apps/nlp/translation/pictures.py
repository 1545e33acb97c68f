"""Pictures of a translation model: who takes which language and which subwords, what it attends to, how it learned.

Each function turns plain arrays into a matplotlib ``Figure``, as in ``apps.report.plots``. The font is DejaVu Sans,
which matplotlib brings along: it has Latin, Greek, Cyrillic, Arabic and Hebrew letters. Other letters use those
fonts of `_FURTHER` that the machine has; a box stands for a letter that all fonts lack.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from apps.report.plots import PALETTE, clean_axis, expert_colors, new_picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

_WRITTEN = 16  # experts up to which each cell has its number
_WIDTH = 12.5  # inches that a picture has for maps side by side
# Families of Chinese, Japanese and Korean, Indic and other letters, as Linux, macOS and Windows have them.
_FURTHER = (
    "Noto Sans CJK",
    "Source Han Sans",
    "WenQuanYi",
    "IPAGothic",
    "Droid Sans Fallback",
    "Noto Sans",
    "Lohit",
    "PingFang",
    "Hiragino Sans",
    "Apple SD Gothic Neo",
    "Arial Unicode MS",
    "Microsoft YaHei",
    "Yu Gothic",
    "Malgun Gothic",
    "Nirmala UI",
    "Leelawadee UI",
    "Unifont",
)


@dataclass(frozen=True)
class ExpertMap:
    """One layer's map.

    Attributes:
        layer: its name.
        rows: names.
        values: (rows, E) shares in 0..1; NaN where there is nothing to show.
    """

    layer: str
    rows: tuple[str, ...]
    values: np.ndarray

    def __post_init__(self) -> None:
        if self.values.ndim != 2 or len(self.values) != len(self.rows):
            raise ValueError(f"map of {self.layer!r}: values {self.values.shape} for {len(self.rows)} rows")


def expert_maps(bands: Sequence[Sequence[ExpertMap]], title: str, of: str, top: float | None = None) -> Figure:
    """Maps of layers, rows by experts, on one scale of colour.

    Args:
        bands: such as those of the encoder and those of the decoder; a band's maps have the same rows, and stand side
            by side as far as there is room.
        title: of the picture.
        of: what the colour says.
        top: share at which the colours end; None: at the largest.

    Raises:
        ValueError: no map, or maps of a band with other rows.
    """
    bands = [band for band in bands if band]
    if not bands:
        raise ValueError("expert_maps needs at least one map")
    for band in bands:
        if any(m.rows != band[0].rows for m in band):
            raise ValueError(f"maps of {band[0].layer!r} and its neighbours have different rows")
    experts = max(m.values.shape[1] for band in bands for m in band)
    width = max(1.7, (0.38 if experts <= _WRITTEN else 0.18 if experts <= 32 else 0.095) * experts)
    columns = min(max(1, int(_WIDTH / width)), max(len(band) for band in bands))
    lines = [band[i : i + columns] for band in bands for i in range(0, len(band), columns)]
    heights = [max(0.7, 0.24 * len(line[0].rows)) for line in lines]
    names = 0.075 * max(len(row) for line in lines for row in line[0].rows)
    fig = new_picture(max(5.0, columns * (width + 0.15) + names + 1.3), sum(h + 0.62 for h in heights) + 0.45)
    axes = fig.subplots(len(lines), columns, squeeze=False, gridspec_kw={"height_ratios": heights})
    largest = max(
        (float(np.nanmax(m.values)) for line in lines for m in line if np.isfinite(m.values).any()), default=1
    )
    top = min(top or largest, largest) or 1.0
    image: Any = None
    for line, row in zip(lines, axes, strict=True):
        for axis in row[len(line) :]:
            axis.set_visible(False)
        for place, (axis, m) in enumerate(zip(row, line, strict=False)):
            image = axis.imshow(100 * m.values, aspect="auto", cmap="cividis", vmin=0.0, vmax=100 * top)
            axis.set_facecolor("#e8e8e8")
            axis.set_title(m.layer, fontsize=9)
            axis.set_xticks(range(0, m.values.shape[1], max(1, m.values.shape[1] // 16)))
            axis.tick_params(labelsize=7.5)
            axis.set_yticks(range(len(m.rows)), m.rows if place == 0 else [""] * len(m.rows), fontsize=8)
            if m.values.shape[1] <= _WRITTEN:
                for (r, c), value in np.ndenumerate(m.values):
                    if np.isfinite(value):
                        color = "black" if value > 0.6 * top else "white"
                        axis.text(c, r, f"{100 * value:.0f}", ha="center", va="center", fontsize=6.5, color=color)
    for axis in axes[-1][: len(lines[-1])]:
        axis.set_xlabel("expert", fontsize=8)
    extend = "max" if largest > top else "neither"
    shrink = min(0.95, 4.0 / fig.get_figheight())
    fig.colorbar(image, ax=axes, label=of, pad=0.02, shrink=shrink, aspect=25 * shrink + 3, extend=extend)
    fig.suptitle(title, fontsize=11)
    return fig


# ---- one sentence


@dataclass(frozen=True)
class Routes:
    """The subwords of one side of a sentence and the experts that computed them.

    Attributes:
        title: of the panel.
        pieces: T subwords.
        experts: layer name to (T, K) expert numbers, the one of the highest gate first; E where there is none.
    """

    title: str
    pieces: tuple[str, ...]
    experts: Mapping[str, np.ndarray]

    def __post_init__(self) -> None:
        for layer, ids in self.experts.items():
            if ids.ndim != 2 or len(ids) != len(self.pieces):
                raise ValueError(f"experts of {layer!r} have shape {ids.shape}, not ({len(self.pieces)} subwords, K)")


def sentence_routes(sides: Sequence[Routes], num_experts: int, title: str) -> Figure:
    """A panel a side: rows subwords, columns layers, in each cell its experts; the colour is the first one's.

    Args:
        sides: source and target; a side without MoE layers is left out.
        num_experts: E; a cell of a subword that no expert computed is white, with a cross.
        title: of the picture.

    Raises:
        ValueError: no layer.
    """
    sides = [side for side in sides if side.experts]
    if not sides:
        raise ValueError("sentence_routes needs at least one layer")
    colors = expert_colors(num_experts)
    most = max(ids.shape[1] for side in sides for ids in side.experts.values())
    digits = len(str(num_experts - 1)) * most + most - 1
    cell = max(0.42, 0.085 * digits + 0.14)
    rows = max(len(side.pieces) for side in sides)
    widths = [max(0.9, cell * len(side.experts)) for side in sides]
    labels = [0.095 * max(len(p) for p in side.pieces) + 0.25 for side in sides]
    fig = new_picture(max(_title_width(title), sum(widths) + sum(labels) + 0.7), 0.235 * rows + 1.2)
    axes = fig.subplots(1, len(sides), squeeze=False, gridspec_kw={"width_ratios": widths})[0]
    for axis, side in zip(axes, sides, strict=True):
        _route_panel(axis, side, colors)
        # Rows of one height on both sides: the shorter one ends earlier.
        axis.set_ylim(rows - 0.5, -0.5)
    fig.suptitle(title, fontsize=10, **_text())
    return fig


def _route_panel(axis: Axes, side: Routes, colors: Sequence[str]) -> None:
    from matplotlib.colors import to_rgb

    image = np.ones((len(side.pieces), len(side.experts), 3))
    for c, ids in enumerate(side.experts.values()):
        for r, own in enumerate(ids):
            chosen = [int(e) for e in own if 0 <= e < len(colors)]
            if chosen:
                image[r, c] = to_rgb(colors[chosen[0]])
            text = " ".join(map(str, chosen)) or "\N{MULTIPLICATION SIGN}"
            dark = image[r, c] @ (0.299, 0.587, 0.114) < 0.55
            axis.text(c, r, text, ha="center", va="center", fontsize=7.5, color="white" if dark else "black")
    axis.imshow(image, aspect="auto", interpolation="nearest")
    for edge in range(1, len(side.pieces)):
        axis.axhline(edge - 0.5, color="white", linewidth=1)
    for edge in range(1, len(side.experts)):
        axis.axvline(edge - 0.5, color="white", linewidth=2.5)
    axis.set_xticks(range(len(side.experts)), [name.split()[-1] for name in side.experts], fontsize=8)
    axis.xaxis.tick_top()
    axis.xaxis.set_label_position("top")
    axis.set_xlabel(side.title, fontsize=9)
    axis.set_yticks(range(len(side.pieces)), [drawn(p) for p in side.pieces], fontsize=8.5, **_text())
    axis.tick_params(length=0)
    for spine in axis.spines.values():
        spine.set_visible(False)


def attention_map(weights: np.ndarray, source: Sequence[str], target: Sequence[str], title: str) -> Figure:
    """How much each token that is said attends to each source token.

    Args:
        weights: (L, S), rows sum to 1.
        source: S subwords, columns.
        target: L subwords, rows; a row's is the one that is said, not the one read before it.
        title: of the picture.

    Raises:
        ValueError: weights that do not fit the subwords.
    """
    if weights.shape != (len(target), len(source)):
        raise ValueError(f"weights have shape {weights.shape}, not ({len(target)} target, {len(source)} source)")
    names = [[drawn(p) for p in side] for side in (source, target)]
    wide = 0.09 * max(map(len, names[1]))
    high = 0.09 * max(map(len, names[0]))
    fig = new_picture(
        max(_title_width(title), 0.24 * len(source) + wide + 1.4), max(2.6, 0.24 * len(target) + high + 0.8)
    )
    axis = fig.subplots()
    image = axis.imshow(100 * weights, aspect="equal", cmap="cividis", vmin=0.0, interpolation="nearest")
    axis.set_xticks(range(len(source)), names[0], rotation=90, fontsize=8.5, **_text())
    axis.set_yticks(range(len(target)), names[1], fontsize=8.5, **_text())
    axis.xaxis.tick_top()
    axis.tick_params(length=2)
    fig.colorbar(image, ax=axis, label="attention, %", pad=0.02, shrink=0.8)
    fig.suptitle(title, fontsize=10, **_text())
    return fig


def _title_width(title: str) -> float:
    """Return the inches that a picture has at least, for its title of 10 points to stand on one line."""
    return max(4.2, 0.09 * len(title) + 0.2)


def drawn(piece: str) -> str:
    """A subword with a box for each character that the fonts lack."""
    known = _characters()
    if any(ord(c) not in known for c in piece):
        _tell_of_boxes()
    return "".join(c if ord(c) in known else "\N{WHITE SQUARE}" for c in piece)


def _text() -> dict[str, Any]:
    """Of text from a corpus: a dollar sign is one, and each glyph comes from the first font that has it."""
    return {"parse_math": False, "fontfamily": list(_families())}


@cache
def _families() -> tuple[str, ...]:
    from matplotlib import font_manager

    installed = sorted({font.name for font in font_manager.fontManager.ttflist})
    return ("DejaVu Sans", *dict.fromkeys(name for start in _FURTHER for name in installed if name.startswith(start)))


@cache
def _characters() -> frozenset[int]:
    from matplotlib import font_manager

    fonts = (font_manager.get_font(font_manager.findfont(name)) for name in _families())
    return frozenset(character for font in fonts for character in font.get_charmap())


@cache
def _tell_of_boxes() -> None:
    log.warning("pictures have boxes for characters that no font here has: install one, such as Noto Sans CJK")


# ---- learning


@dataclass(frozen=True)
class Curve:
    """Values over the steps of a training.

    Attributes:
        label: in the legend.
        steps: where it was logged, ascending.
        values: same length.
    """

    label: str
    steps: np.ndarray
    values: np.ndarray


def learning_curves(panels: Mapping[str, Sequence[Curve]], title: str, best: str | None = None) -> Figure:
    """A panel a quantity, curves over optimizer steps.

    A curve of over 200 values is drawn pale, with the mean of each 100th part of it over that.

    Args:
        panels: name of the vertical axis to its curves; one without curves is left out.
        title: of the picture.
        best: label of the curves whose highest value is marked, and told in the legend.

    Raises:
        ValueError: no curve.
    """
    panels = {name: curves for name, curves in panels.items() if curves}
    if not panels:
        raise ValueError("learning_curves needs at least one curve")
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
