"""Files of images side by side, with overlays; every other picture is a chart of a page.

The only module that uses matplotlib: no pyplot, no display, no global state.
"""

from __future__ import annotations

import base64
import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from apps.base.files import replacing
from apps.report.colors import PALETTE, expert_colors

if TYPE_CHECKING:
    from PIL.Image import Image

_RIGHT = PALETTE[2]
"""Color of the frame of a right image."""
_MOST_NUMBERED = 10
"""Patches of a side of an image up to which each has its expert's number."""
NO_EXPERT = "\N{MULTIPLICATION SIGN}"


@dataclass(frozen=True)
class Tile:
    """An image.

    Attributes:
        image: (H, W), (H, W, 1) or (H, W, 3), values in 0..1.
        caption: text above it.
        over: (h, w, 4), colors with their opacity that are laid over it; None: there are none.
        texts: text on each of the (h, w) parts; empty: nothing.
        is_framed: whether it has a green frame.
    """

    image: np.ndarray
    caption: str = ""
    over: np.ndarray | None = None
    texts: tuple[tuple[str, ...], ...] = ()
    is_framed: bool = False


def data_url(image: Image, kind: str = "PNG", **options: Any) -> str:
    """Return an image as a URL that holds it."""
    content = io.BytesIO()
    image.save(content, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(content.getvalue()).decode()}"


def tinted(image: np.ndarray, ids: np.ndarray, num_experts: int, caption: str = "") -> Tile:
    """Return an image with its patches in the color of their expert, which has its number there too.

    Args:
        image: as in ``Tile``.
        ids: int (h, w), experts; -1 where no expert computed the patch.
        num_experts: E.
        caption: as in ``Tile``.
    """
    colors = expert_colors(num_experts)
    computed = (ids >= 0) & (ids < num_experts)
    over = np.zeros((*ids.shape, 4))
    for place in zip(*computed.nonzero(), strict=True):
        color = colors[ids[place]]
        over[place] = (*(int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)), 0.6)
    names = np.where(computed, ids.astype(str), NO_EXPERT)
    texts = tuple(map(tuple, names.tolist())) if max(ids.shape) <= _MOST_NUMBERED else ()
    # Half the contrast and brighter, or the tints of dark patches all look black.
    return Tile(0.45 + 0.55 * np.asarray(image, np.float64), caption, over, texts)


def heated(image: np.ndarray, weights: np.ndarray, caption: str) -> Tile:
    """Return a dark image with a weight for each patch, (h, w), the largest the brightest."""
    from matplotlib import colormaps

    over = colormaps["inferno"](weights / max(float(weights.max()), 1e-12))
    over[..., 3] = 0.6
    return Tile(0.5 * (image if image.ndim == 2 else image.mean(-1)), caption, over)


def save_images(
    rows: Sequence[Sequence[Tile | None]],
    path: Path,
    title: str,
    names: Sequence[str] = (),
    num_experts: int = 0,
    side: float = 1.35,
) -> Path:
    """Write images as one PNG file, whole or not at all, and make its folder; return the path.

    Args:
        rows: the images; None leaves a gap.
        path: the file.
        title: title of the file.
        names: text to the left of each row.
        num_experts: experts whose colors are listed next to the images, up to 32.
        side: height and width of an image in inches.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    columns = max(map(len, rows))
    texts = [textwrap.fill(textwrap.shorten(name, 130, placeholder=" ..."), 34) for name in names]
    left = 0.08 * max((len(line) for text in texts for line in text.splitlines()), default=0)
    captions = 0.22 * sum(any(tile is not None and tile.caption for tile in row) for row in rows)
    width = max(4.6, 0.095 * len(title), side * columns + left + 0.4 + 0.9 * (0 < num_experts <= 32))
    figure = Figure(figsize=(width, (side + 0.06) * len(rows) + captions + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    for number, row in enumerate(figure.subplots(len(rows), columns, squeeze=False)):
        if texts:
            style = {"rotation": 0, "ha": "right", "va": "center", "fontsize": 8.5, "parse_math": False}
            row[0].set_ylabel(texts[number], **style)
        for axis, tile in zip(row, (*rows[number], *[None] * columns), strict=False):
            axis.set_xticks([])
            axis.set_yticks([])
            for spine in axis.spines.values():
                spine.set_visible(tile is not None and tile.is_framed)
                spine.set_color(_RIGHT)
                spine.set_linewidth(3.5)
            if tile is not None:
                _draw(axis, tile)
            elif axis is not row[0]:
                axis.set_axis_off()
    if 0 < num_experts <= 32:
        handles = [Patch(facecolor=color, label=str(e)) for e, color in enumerate(expert_colors(num_experts))]
        own = {"title": "expert", "loc": "outside right upper", "ncols": 1 + (num_experts - 1) // 16}
        figure.legend(handles=handles, fontsize=8, title_fontsize=8, frameon=False, **own)
    figure.suptitle(title, fontsize=11, parse_math=False)
    with replacing(path, "wb") as file:
        figure.savefig(file, format="png", dpi=150, facecolor="white")
    return path


def _draw(axis: Any, tile: Tile) -> None:
    from matplotlib.patheffects import withStroke

    image = np.clip(tile.image[..., 0] if tile.image.ndim == 3 and tile.image.shape[-1] == 1 else tile.image, 0.0, 1.0)
    axis.imshow(image, cmap="gray", vmin=0.0, vmax=1.0, interpolation="nearest")
    axis.set_title(textwrap.shorten(tile.caption, 20, placeholder="..."), fontsize=9, parse_math=False)
    if tile.over is None:
        return
    rows, columns = tile.over.shape[:2]
    extent = (-0.5, image.shape[1] - 0.5, image.shape[0] - 0.5, -0.5)
    axis.imshow(tile.over, extent=extent, interpolation="nearest")
    style = {"ha": "center", "va": "center", "color": "white", "fontsize": max(5.5, min(9.0, 40 / columns))}
    outlined = [withStroke(linewidth=1.2, foreground="black")]
    for r, line in enumerate(tile.texts):
        for c, text in enumerate(line):
            place = ((c + 0.5) * image.shape[1] / columns - 0.5, (r + 0.5) * image.shape[0] / rows - 0.5)
            axis.text(*place, text, path_effects=outlined, **style)
