"""Pictures of images with texts: the patches of each expert, and the images that are retrieved for sentences.

Each function turns plain arrays into a matplotlib ``Figure``, as in ``apps.report.plots``.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from apps.report.plots import expert_colors, new_picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_RIGHT = "#009E73"
"""Colour of the frame of a right image, the green of ``apps.report.plots``."""


@dataclass(frozen=True)
class Retrieved:
    """What is retrieved for one sentence.

    Attributes:
        sentence: the text.
        rank: rank of the best of its own images among all.
        images: (n, H, W, C) or (n, H, W), values in 0..1, the best first.
        is_right: whether each of them is the sentence's own.
    """

    sentence: str
    rank: int
    images: np.ndarray
    is_right: tuple[bool, ...]


def retrieval_grid(rows: Sequence[Retrieved], num_images: int) -> Figure:
    """Draw for each sentence the images that are retrieved, the best first and the right ones framed.

    Args:
        rows: the sentences, at least one, with the same number of images.
        num_images: number of images among which they are.
    """
    columns = max(len(row.images) for row in rows)
    side, text = 1.05, 2.6
    fig = new_picture(text + side * columns + 0.3, (side + 0.12) * len(rows) + 0.55)
    ratios = {"width_ratios": [text, *[side] * columns]}
    axes = fig.subplots(len(rows), columns + 1, squeeze=False, gridspec_kw=ratios)
    for line, row in zip(axes, rows, strict=True):
        line[0].axis("off")
        sentence = "\n".join(textwrap.wrap(textwrap.shorten(row.sentence, 130, placeholder=" ..."), 34))
        line[0].text(0.0, 0.5, sentence, fontsize=8.5, va="center", ha="left", transform=line[0].transAxes)
        line[0].text(
            0.0, 0.02, f"rank {row.rank:,}", fontsize=7.5, color="#555555", va="bottom", transform=line[0].transAxes
        )
        for axis in line[1 + len(row.images) :]:
            axis.axis("off")
        for axis, image, is_right in zip(line[1:], row.images, row.is_right, strict=False):
            show_image(axis, image)
            for spine in axis.spines.values():
                spine.set_visible(is_right)
                spine.set_color(_RIGHT)
                spine.set_linewidth(3.5)
    fig.suptitle(f"The best of {num_images:,} images for a sentence; its own is framed", fontsize=11)
    return fig


def patch_grid(patches: Mapping[str, Sequence[np.ndarray]]) -> Figure:
    """Draw the patches of each expert, a row an expert and a block of columns a layer.

    Args:
        patches: by layer, for each expert (n, h, w, C) or (n, h, w), values in 0..1; n may be 0.
    """
    side, gap = 0.42, 0.55
    experts = max(len(of_layer) for of_layer in patches.values())
    counts = [max(1, *(len(own) for own in of_layer)) for of_layer in patches.values()]
    fig = new_picture(max(4.6, sum(side * n + gap for n in counts) + 0.3), side * experts * 1.08 + 0.95)
    (parts,) = fig.subfigures(1, len(patches), squeeze=False, width_ratios=[side * n + gap for n in counts])
    for part, (layer, of_layer), columns in zip(parts, patches.items(), counts, strict=True):
        part.suptitle(layer, fontsize=9)
        axes = part.subplots(experts, columns, squeeze=False)
        colors = expert_colors(len(of_layer))
        for line in axes:
            for axis in line:
                axis.axis("off")
        for expert, (line, own) in enumerate(zip(axes, of_layer, strict=False)):
            line[0].text(
                -0.25, 0.5, str(expert), fontsize=8, ha="right", va="center", transform=line[0].transAxes,
                bbox={"facecolor": colors[expert], "edgecolor": "none", "pad": 1.5, "alpha": 0.6},
            )  # fmt: skip
            for axis, patch in zip(line, own, strict=False):
                show_image(axis, patch)
                for spine in axis.spines.values():
                    spine.set_visible(False)
    fig.suptitle("Patches of each expert, those of its largest gates", fontsize=11)
    return fig


def show_image(axis: Axes, image: np.ndarray) -> None:
    """Draw an image (H, W, C) or (H, W), values in 0..1, without ticks."""
    axis.axis("on")
    image = image[..., 0] if image.ndim == 3 and image.shape[-1] == 1 else image
    axis.imshow(np.clip(image, 0.0, 1.0), cmap="gray", vmin=0.0, vmax=1.0, interpolation="nearest")
    axis.set_xticks([])
    axis.set_yticks([])
