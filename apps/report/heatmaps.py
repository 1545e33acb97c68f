"""Heat maps of shares: which expert takes the tokens of a class, a language or a value."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from textwrap import fill
from typing import TYPE_CHECKING, Any

import numpy as np

from apps.report.plots import MOST_NUMBERED, name_columns, new_picture

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_WIDEST = 12.5  # inches for maps side by side


@dataclass(frozen=True)
class Heatmap:
    """One map.

    Attributes:
        title: title of the map; "" for none.
        rows, columns: their names.
        values: (rows, columns) shares in 0..1; NaN where there is nothing to show.

    Raises:
        ValueError: values of another shape.
    """

    title: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: np.ndarray

    def __post_init__(self) -> None:
        if self.values.shape != (len(self.rows), len(self.columns)):
            raise ValueError(
                f"heat map {self.title!r}: values {self.values.shape} for {len(self.rows)} rows and "
                f"{len(self.columns)} columns"
            )


def heatmaps(
    bands: Sequence[Sequence[Heatmap]], title: str, label: str, top: float | None = None, across: str = "expert"
) -> Figure:
    """Draw maps on one scale of colour, in percent.

    Args:
        bands: the maps of a band have the same rows and stand side by side as far as there is room; bands stand below
            each other. Empty ones are left out.
        title: title of the picture.
        label: meaning of the colour.
        top: share at which the colours end; None: the largest.
        across: meaning of the columns, where their names are numbers.

    Raises:
        ValueError: maps of a band have different rows.
    """
    bands = [band for band in bands if band]
    for band in bands:
        if any(m.rows != band[0].rows for m in band):
            raise ValueError(f"heat map {band[0].title!r} and its neighbours have different rows")
    width = max(_width(len(m.columns)) for band in bands for m in band)
    columns = min(max(1, int(_WIDEST / width)), max(len(band) for band in bands))
    lines = [band[i : i + columns] for band in bands for i in range(0, len(band), columns)]
    widths = [max(_width(len(line[i].columns)) for line in lines if i < len(line)) for i in range(columns)]
    heights = [max(0.7, 0.25 * len(line[0].rows)) for line in lines]
    names = 0.08 * max(len(row) for line in lines for row in line[0].rows)
    below = 0.55 + 0.075 * max(len(c) for band in bands for m in band for c in m.columns)
    fig = new_picture(
        max(4.8, 0.095 * len(title), sum(widths) + 0.2 * columns + names + 1.3),
        sum(heights) + below * len(lines) + 0.5,
    )
    ratios: dict[str, Any] = {"height_ratios": heights, "width_ratios": widths}
    axes = fig.subplots(len(lines), columns, squeeze=False, gridspec_kw=ratios)
    shown = [np.nanmax(m.values) for line in lines for m in line if np.isfinite(m.values).any()]
    largest = float(max(shown, default=1.0)) or 1.0
    top = min(top or largest, largest)
    image: Any = None
    for line, row in zip(lines, axes, strict=True):
        for axis in row[len(line) :]:
            axis.set_visible(False)
        for axis, m in zip(row, line, strict=False):
            image = _draw(axis, m, top, across)
            axis.set_yticks(range(len(m.rows)), m.rows if axis is row[0] else [""] * len(m.rows), fontsize=8)
    shrink = min(0.95, 4.0 / fig.get_figheight())
    extend = "max" if largest > top else "neither"
    bar = fig.colorbar(image, ax=axes, pad=0.02, shrink=shrink, aspect=25 * shrink + 3, extend=extend)
    bar.set_label(fill(label, max(12, int(fig.get_figheight() / 0.075))), fontsize=8)  # as high as the picture at most
    bar.ax.tick_params(labelsize=8)
    fig.suptitle(title, fontsize=11)
    return fig


def _width(num_columns: int) -> float:
    """Return the width of a map in inches."""
    return max(1.7, (0.4 if num_columns <= MOST_NUMBERED else 0.18 if num_columns <= 32 else 0.1) * num_columns)


def _draw(axis: Axes, m: Heatmap, top: float, across: str) -> Any:
    image = axis.imshow(
        100 * m.values, aspect="auto", cmap="cividis", vmin=0.0, vmax=100 * top, interpolation="nearest"
    )
    axis.set_facecolor("#e8e8e8")
    axis.set_title(m.title, fontsize=9)
    axis.tick_params(labelsize=8)
    name_columns(axis, m.columns)
    if all(name.isdigit() for name in m.columns):
        axis.set_xlabel(across, fontsize=8)
    if len(m.columns) <= MOST_NUMBERED:
        for (r, c), value in np.ndenumerate(m.values):
            if np.isfinite(value):
                color = "black" if value > 0.6 * top else "white"
                axis.text(c, r, f"{100 * value:.0f}", ha="center", va="center", fontsize=6.5, color=color)
    return image


def numbers(count: int) -> tuple[str, ...]:
    """Return "0", "1", ...: the names of columns without names."""
    return tuple(map(str, range(count)))


def row_names(names: Sequence[str], shares_of_all: Iterable[float]) -> tuple[str, ...]:
    """Return the names of a map's rows: each name with its share, and "all" for the last row."""
    percent = ("<1 %" if share < 0.005 else f"{100 * share:.0f} %" for share in shares_of_all)
    return (*(f"{name} ({text})" for name, text in zip(names, percent, strict=True)), "all")


def maps_by_label(
    counts: Mapping[str, np.ndarray], names: Sequence[str], most_rows: int = 40
) -> tuple[list[Heatmap], bool]:
    """Return a map for each layer: the share of each label's tokens, and of all tokens, that each expert takes.

    A label without a token has no row. The names of the rows show each label's share of all tokens.

    Args:
        counts: layer name to (labels, E) tokens.
        names: names of the labels.
        most_rows: with more labels only those with the highest peaks have a row.

    Returns:
        The maps, and whether labels were left out.
    """
    size_C = np.sum([counts_CE.sum(1) for counts_CE in counts.values()], axis=0)
    kept = np.flatnonzero(size_C)
    too_many = len(kept) > most_rows
    if too_many:
        peak_C = np.max([np.nan_to_num(shares(counts_CE)).max(1) for counts_CE in counts.values()], axis=0)
        kept = np.sort(kept[np.argsort(-peak_C[kept], kind="stable")[:most_rows]])
    rows = row_names([names[int(i)] for i in kept], size_C[kept] / size_C.sum())
    maps = [
        Heatmap(layer, rows, numbers(c.shape[1]), shares(np.concatenate([c[kept], c.sum(0, keepdims=True)])))
        for layer, c in counts.items()
    ]
    return maps, too_many


def shares(counts: np.ndarray) -> np.ndarray:
    """Return counts as shares of their row; NaN in a row without any."""
    sums = counts.sum(1, keepdims=True)
    return np.where(sums > 0, counts / np.maximum(sums, 1), np.nan)
