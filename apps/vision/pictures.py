"""Pictures of an image classifier's routing: which expert computed which patch.

Each function turns plain arrays into a matplotlib ``Figure``, as in ``apps.report.plots``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from apps.report.plots import expert_colors, new_picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def routing_over_images(
    images: np.ndarray, experts: Mapping[str, np.ndarray], num_experts: int, titles: Sequence[str]
) -> Figure:
    """Draw each image plain, and for each layer with its patches in the colour of their expert.

    Args:
        images: (N, H, W), (N, H, W, 1) or (N, H, W, 3), values in 0..1.
        experts: layer name to (N, grid height, grid width) expert numbers; ``num_experts`` where no expert computed it.
        num_experts: E.
        titles: a caption an image, for instance its class.
    """
    images = np.asarray(images, dtype=np.float64)
    images = images[..., 0] if images.ndim == 4 and images.shape[-1] == 1 else images
    n = len(images)
    side = 1.45
    columns = 1 + len(experts)
    fig = new_picture(max(5.0, side * columns + 1.0), side * n + 1.1)
    axes = fig.subplots(n, columns, squeeze=False)
    colors = expert_colors(num_experts)
    for row, image in enumerate(images):
        _show_image(axes[row][0], image)
        axes[row][0].set_ylabel(titles[row], fontsize=9)
        for column, ids in enumerate(experts.values(), start=1):
            # Half the contrast and brighter, or the tints of dark patches all look black.
            _show_image(axes[row][column], 0.45 + 0.55 * image)
            _tint(axes[row][column], ids[row], image.shape[:2], colors)
    for column, name in enumerate(["image", *experts]):
        axes[0][column].set_title(name, fontsize=9)
    dropped = any(((ids < 0) | (ids >= num_experts)).any() for ids in experts.values())
    _expert_legend(fig, colors, dropped)
    fig.suptitle("Expert of each patch", fontsize=11)
    return fig


def _show_image(axis: Axes, image: np.ndarray) -> None:
    axis.imshow(np.clip(image, 0.0, 1.0), cmap="gray", vmin=0.0, vmax=1.0, interpolation="nearest")
    axis.set_xticks([])
    axis.set_yticks([])


def _tint(axis: Axes, ids: np.ndarray, size: tuple[int, int], colors: Sequence[str]) -> None:
    """Lay the experts' colours over an image of ``size`` and write their numbers where a patch has room for them."""
    from matplotlib.colors import to_rgba
    from matplotlib.patheffects import withStroke

    height, width = size[0] / ids.shape[0], size[1] / ids.shape[1]
    rgba = np.zeros((*ids.shape, 4))
    for (r, c), expert in np.ndenumerate(ids):
        computed = 0 <= expert < len(colors)
        rgba[r, c] = to_rgba(colors[expert], 0.6) if computed else (0, 0, 0, 0)
        if max(ids.shape) <= 10:
            axis.text(
                (c + 0.5) * width - 0.5,
                (r + 0.5) * height - 0.5,
                str(expert) if computed else "\N{MULTIPLICATION SIGN}",
                ha="center",
                va="center",
                fontsize=5.5,
                color="white",
                path_effects=[withStroke(linewidth=1.2, foreground="black")],
            )
    axis.imshow(rgba, extent=(-0.5, size[1] - 0.5, size[0] - 0.5, -0.5), interpolation="nearest")


def _expert_legend(fig: Figure, colors: Sequence[str], dropped: bool) -> None:
    from matplotlib.patches import Patch

    if len(colors) > 32:
        return
    handles = [Patch(facecolor=c, label=str(e)) for e, c in enumerate(colors)]
    if dropped:
        handles.append(Patch(facecolor="white", edgecolor="black", label="\N{MULTIPLICATION SIGN} none"))
    fig.legend(
        handles=handles,
        title="expert",
        loc="outside right upper",
        ncols=1 + (len(handles) - 1) // 16,
        fontsize=8,
        title_fontsize=8,
        frameon=False,
    )
