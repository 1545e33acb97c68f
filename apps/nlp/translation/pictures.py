"""Pictures of one translated sentence: which experts computed its subwords, and what the decoder attended to.

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

from apps.report.plots import expert_colors, new_picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

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
    """Draw a panel a side: rows are subwords, columns layers; a cell has its experts and the colour of the first.

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
    """Draw how much each token of the translation attends to each source token.

    Args:
        weights: (L, S), rows sum to 1.
        source: S subwords, columns.
        target: L subwords, rows; a row's token is the one that is written, not the one read before it.
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
    """Return a subword with a box for each character that the fonts lack."""
    known = _characters()
    if any(ord(c) not in known for c in piece):
        _tell_of_boxes()
    return "".join(c if ord(c) in known else "\N{WHITE SQUARE}" for c in piece)


def _text() -> dict[str, Any]:
    """Return the style of text from a corpus: a dollar sign is one, and each glyph is of the first font that has it."""
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
