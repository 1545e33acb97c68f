"""Pictures of routing and of quality against cost, for any app.

Each function turns plain arrays into a matplotlib ``Figure`` and touches no global state: no pyplot, no display.
``save_picture`` writes it. Colours are Okabe and Ito's, which people with colour-blindness can tell apart; where an
expert is a colour its number is written as well.
"""

from __future__ import annotations

import io
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
_MARKERS = "osD^vPX*"


@dataclass(frozen=True)
class Series:
    """Points of one kind of model in ``quality_against_flops``.

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

    def __post_init__(self) -> None:
        lengths = {len(self.flops), len(self.quality), len(self.flops if self.interval is None else self.interval)}
        if len(lengths) != 1:
            raise ValueError(f"series {self.label!r}: flops, quality and interval differ in length")


def expert_colors(num_experts: int) -> list[str]:
    """One hex colour an expert: the palette up to 8, beyond it an even walk over a colour map of rising lightness."""
    if num_experts <= len(PALETTE):
        return list(PALETTE[:num_experts])
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    # A stride near the golden ratio puts neighbours in number far apart in colour.
    order = np.argsort((np.arange(num_experts) * 0.618034) % 1.0, kind="stable")
    return [to_hex(c) for c in colormaps["viridis"](np.linspace(0.05, 0.98, num_experts))[order]]


def routing_over_images(
    images: np.ndarray,
    experts: Mapping[str, np.ndarray],
    num_experts: int,
    titles: Sequence[str] | None = None,
    title: str = "Expert of each patch",
) -> Figure:
    """Each image once plain and once a layer with its patches in the colour of their expert.

    Args:
        images: (N, H, W), (N, H, W, 1) or (N, H, W, 3), values in 0..1.
        experts: layer name to (N, grid height, grid width) expert numbers; ``num_experts`` or -1: none computed it.
        num_experts: E.
        titles: a caption an image, for instance its class.
        title: of the picture.

    Raises:
        ValueError: no layer, or arrays that do not fit each other.
    """
    images = np.asarray(images, dtype=np.float64)
    images = images[..., 0] if images.ndim == 4 and images.shape[-1] == 1 else images
    n = len(images)
    if not experts:
        raise ValueError("routing_over_images needs at least one layer")
    for name, ids in experts.items():
        if ids.ndim != 3 or len(ids) != n:
            raise ValueError(f"experts of {name!r} have shape {ids.shape}, not ({n}, grid height, grid width)")
    side = 1.45
    columns = 1 + len(experts)
    fig = new_picture(max(5.0, side * columns + 1.0), side * n + 1.1)
    axes = fig.subplots(n, columns, squeeze=False)
    colors = expert_colors(num_experts)
    for row, image in enumerate(images):
        _show_image(axes[row][0], image)
        if titles is not None:
            axes[row][0].set_ylabel(titles[row], fontsize=9)
        for column, ids in enumerate(experts.values(), start=1):
            # Half the contrast and brighter, or the tints of dark patches all look black.
            _show_image(axes[row][column], 0.45 + 0.55 * image)
            _tint(axes[row][column], ids[row], image.shape[:2], colors)
    for column, name in enumerate(["image", *experts]):
        axes[0][column].set_title(name, fontsize=9)
    dropped = any(((ids < 0) | (ids >= num_experts)).any() for ids in experts.values())
    _expert_legend(fig, colors, dropped)
    fig.suptitle(title, fontsize=11)
    return fig


def expert_class_heatmap(
    share: Mapping[str, np.ndarray],
    class_names: Sequence[str],
    title: str = "Which expert takes the tokens of a class",
    max_classes: int = 40,
) -> Figure:
    """A map a layer: rows classes, columns experts, colour the share of the class's routed tokens.

    Args:
        share: layer name to (num_classes, E); rows sum to 1, or are 0 for a class without tokens.
        class_names: one a row.
        title: of the picture.
        max_classes: beyond it only the classes whose largest share, over layers, is highest are drawn.

    Raises:
        ValueError: no layer, or a map that does not have a row a class.
    """
    if not share:
        raise ValueError("expert_class_heatmap needs at least one layer")
    for name, values in share.items():
        if values.ndim != 2 or len(values) != len(class_names):
            raise ValueError(f"share of {name!r} has shape {values.shape}, not ({len(class_names)} classes, experts)")
    names = list(class_names)
    rows = np.arange(len(names))
    if len(names) > max_classes:
        peak = np.max([v.max(axis=1) for v in share.values()], axis=0)
        rows = np.sort(np.argsort(-peak, kind="stable")[:max_classes])
        title = f"{title} (the {max_classes} most specialised of {len(names)} classes)"
    num_experts = max(v.shape[1] for v in share.values())
    width = max(2.2, 0.36 * num_experts)
    fig = new_picture(width * len(share) + 2.6, max(2.6, 0.27 * len(rows) + 1.4))
    axes = fig.subplots(1, len(share), squeeze=False, sharey=True)[0]
    top = max(float(v[rows].max()) for v in share.values()) or 1.0
    image: Any = None
    for axis, (name, values) in zip(axes, share.items(), strict=True):
        shown = values[rows]
        image = axis.imshow(100 * shown, aspect="auto", cmap="cividis", vmin=0.0, vmax=100 * top)
        axis.set_title(name, fontsize=9)
        axis.set_xlabel("expert")
        axis.set_xticks(range(0, shown.shape[1], max(1, shown.shape[1] // 16)))
        if shown.shape[1] <= 16 and len(rows) <= 40:
            for (r, c), value in np.ndenumerate(shown):
                color = "black" if value > 0.6 * top else "white"
                axis.text(c, r, f"{100 * value:.0f}", ha="center", va="center", fontsize=6.5, color=color)
    axes[0].set_yticks(range(len(rows)), [names[r] for r in rows], fontsize=8)
    fig.colorbar(image, ax=list(axes), label="share of the class's tokens, %", shrink=0.9, pad=0.02)
    fig.suptitle(title, fontsize=11)
    return fig


def gates_heatmap(gates: Mapping[str, np.ndarray], sequence_length: int, title: str) -> Figure:
    """Who computes whom: a map each, rows experts, columns tokens, colour the weight of the expert in the token.

    Args:
        gates: name, such as "training", to (T, E) weights.
        sequence_length: tokens of a sequence; a line parts the sequences.
        title: of the picture.
    """
    fig = new_picture(4.1 * len(gates) + 0.9, 2.3)
    axes = fig.subplots(1, len(gates), squeeze=False, sharey=True)[0]
    top = max(float(np.nanmax(values)) for values in gates.values()) or 1.0
    image: Any = None
    for axis, (name, values) in zip(axes, gates.items(), strict=True):
        image = axis.imshow(values.T, aspect="auto", cmap="cividis", vmin=0.0, vmax=top, interpolation="nearest")
        for edge in range(sequence_length, len(values), sequence_length):
            axis.axvline(edge - 0.5, color="white", linewidth=1.5)
        axis.set_title(name, fontsize=9)
        axis.set_xlabel("token")
        axis.set_xticks(range(0, len(values), max(1, len(values) // 8)))
        axis.set_yticks(range(values.shape[1]))
        axis.tick_params(labelsize=7)
    axes[0].set_ylabel("expert")
    fig.colorbar(image, ax=list(axes), label="weight", shrink=0.95, pad=0.02)
    fig.suptitle(title, fontsize=10)
    return fig


def load_bars(
    tokens_per_expert: Mapping[str, np.ndarray],
    drop_rate: Mapping[str, float] | None = None,
    title: str = "Load of the experts",
    share_of: str = "routed pairs",
) -> Figure:
    """Bars a layer: the share of the routed pairs each expert computes, beside the even share.

    Args:
        tokens_per_expert: layer name to (E,) counts.
        drop_rate: layer name to the share of pairs no expert computed; written above the bars.
        title: of the picture.
        share_of: what the counts are, for the vertical axis.

    Raises:
        ValueError: no layer.
    """
    if not tokens_per_expert:
        raise ValueError("load_bars needs at least one layer")
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
        axis.set_xlabel("expert")
        axis.set_xticks(range(0, len(counts), max(1, len(counts) // 16)))
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
    """Quality over FLOPs of one example, one marker a series; lone points of equal FLOPs stand side by side.

    Args:
        series: the models.
        quality: name of the vertical axis.
        title: of the picture.
        percent: qualities are shares in 0..1 and drawn in %.
        unit: what the FLOPs are of, such as "an image".

    Raises:
        ValueError: no point to draw.
    """
    flops = [f for s in series for f in s.flops]
    if not flops:
        raise ValueError("quality_against_flops needs at least one point")
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
            marker=_MARKERS[index % len(_MARKERS)],
            linestyle="-" if s.connected else "none",
            markersize=6,
            linewidth=1.5,
            capsize=3,
        )
        _set_beside(fig, drawn.get_children(), _among_equals(series, s))
    if min(flops) > 0 and max(flops) / min(flops) > 20:
        axis.set_xscale("log")
    axis.margins(0.08)
    if percent:  # an interval may reach beyond what there is
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
    """Where a lone point stands among those of the same FLOPs: 0 in the middle, steps of 1."""
    if len(own.flops) != 1:
        return 0.0
    equals = [s for s in series if len(s.flops) == 1 and abs(s.flops[0] - own.flops[0]) <= 0.01 * own.flops[0]]
    return next(i for i, s in enumerate(equals) if s is own) - (len(equals) - 1) / 2


def _set_beside(fig: Figure, artists: Sequence[Artist], place: float) -> None:
    """Move what is drawn sideways by ``place`` times 7 points, so that intervals of equal FLOPs can be told apart."""
    from matplotlib.transforms import ScaledTranslation

    if place:
        for artist in artists:
            artist.set_transform(artist.get_transform() + ScaledTranslation(7 * place / 72, 0, fig.dpi_scale_trans))


def save_picture(fig: Figure, path: str | Path, flat: bool = False) -> Path:
    """Write ``fig`` as PNG, whole or not at all, and make its folder.

    Args:
        fig: the picture.
        path: of the file.
        flat: keep 256 colours, which is enough for maps and text; the file is a third as large.

    Returns:
        The path written.
    """
    path = Path(path)
    with replacing(path, "wb") as file:
        if not flat:
            fig.savefig(file, format="png", dpi=150, facecolor="white")
            return path
        from PIL import Image

        drawn = io.BytesIO()
        fig.savefig(drawn, format="png", dpi=150, facecolor="white")
        # MEDIANCUT, the default, gives the rare ends of a colour map away.
        method, dither = Image.Quantize.MAXCOVERAGE, Image.Dither.NONE
        image = Image.open(drawn).convert("RGB").quantize(256, method=method, dither=dither)
        image.save(file, format="PNG", optimize=True)
    return path


def new_picture(width: float, height: float) -> Figure:
    """Return an empty picture of this size in inches, whose parts keep clear of each other."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    fig = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(fig)
    return fig


def _show_image(axis: Axes, image: np.ndarray) -> None:
    axis.imshow(np.clip(image, 0.0, 1.0), cmap="gray", vmin=0.0, vmax=1.0, interpolation="nearest")
    axis.set_xticks([])
    axis.set_yticks([])


def _tint(axis: Axes, ids: np.ndarray, size: tuple[int, int], colors: Sequence[str]) -> None:
    """Lay the experts' colours over an image of ``size`` and write their numbers where a patch has room for them."""
    from matplotlib.colors import to_rgba

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
                path_effects=_outline(),
            )
    axis.imshow(rgba, extent=(-0.5, size[1] - 0.5, size[0] - 0.5, -0.5), interpolation="nearest")


def _outline() -> list:
    from matplotlib.patheffects import withStroke

    return [withStroke(linewidth=1.2, foreground="black")]


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


def clean_axis(axis: Axes) -> None:
    """Take away the upper and the right line of a frame."""
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def _flop_unit(largest: float) -> tuple[float, str]:
    for scale, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if largest >= scale:
            return scale, unit
    return 1.0, ""
