"""Pictures of captioned images, from plain arrays to a matplotlib ``Figure``, as in ``apps.report.plots``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from apps.report.plots import new_picture

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLUMNS = 6


def looks_at(image: np.ndarray, words: Sequence[str], looks: np.ndarray, title: str) -> Figure:
    """Draw an image, and for each word of its caption where the decoder looks as it writes the word.

    Args:
        image: (H, W) or (H, W, 3), values in 0..1.
        words: N words.
        looks: (N, h, w), how much each looks at each patch; the largest of a word is the brightest.
        title: of the picture.

    Raises:
        ValueError: another number of words than of looks.
    """
    if len(words) != len(looks):
        raise ValueError(f"{len(words)} words and {len(looks)} maps of where they look")
    columns = min(_COLUMNS, len(words) + 1)
    rows = -(-(len(words) + 1) // columns)
    fig = new_picture(max(4.2, 1.35 * columns), 1.62 * rows + 0.45)
    axes = fig.subplots(rows, columns, squeeze=False).ravel()
    height, width = image.shape[:2]
    grey = image if image.ndim == 2 else image.mean(-1)
    for place, axis in enumerate(axes):
        axis.set_xticks([])
        axis.set_yticks([])
        if place == 0:
            axis.imshow(image, cmap="gray", vmin=0.0, vmax=1.0, interpolation="nearest")
            axis.set_title("the image", fontsize=9, style="italic")
        elif place <= len(words):
            axis.imshow(0.5 * grey, cmap="gray", vmin=0.0, vmax=1.0, interpolation="nearest")
            heat = looks[place - 1] / max(float(looks[place - 1].max()), 1e-12)
            extent = (-0.5, width - 0.5, height - 0.5, -0.5)
            axis.imshow(heat, cmap="inferno", alpha=0.6, vmin=0.0, vmax=1.0, extent=extent, interpolation="nearest")
            axis.set_title(words[place - 1], fontsize=9, parse_math=False)
        else:
            axis.set_axis_off()
    fig.suptitle(title, fontsize=10, parse_math=False)
    return fig
