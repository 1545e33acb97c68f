"""Colors and shapes that tell things apart, also for the color-blind; an expert's number is shown next to its color."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence

# Okabe and Ito, "Color Universal Design" (2008), the pale ones last; black is kept for lines.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#999999")


def expert_colors(num_experts: int) -> list[str]:
    """Return a hex color for each expert: the palette's up to 8, beyond it hues and lightnesses far apart."""
    if num_experts <= len(PALETTE):
        return list(PALETTE[:num_experts])
    colors = []
    for expert in range(num_experts):
        # Strides of the golden and the plastic ratio put neighbors in number far apart.
        rgb = colorsys.hls_to_rgb(0.618034 * expert % 1.0, 0.3 + 0.5 * (0.754878 * expert % 1.0), 0.65)
        colors.append("#" + "".join(f"{round(255 * part):02x}" for part in rgb))
    return colors


def ink_on(color: str) -> str:
    """Return black or white, whichever is clearer on a hex color."""
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]  # WCAG 2.2
    return "#000" if luminance > 0.179 else "#fff"


def color_of(label: str, colors: Sequence[str]) -> str | None:
    """Return the color of the number that a label starts with; None if it has none."""
    number = label.split()[0] if label else ""
    return colors[int(number)] if number.isdecimal() and int(number) < len(colors) else None


def shape_of(place: int, shapes: Sequence[str]) -> str:
    """Return the shape of the points at a place among several, so that two of one color of ``PALETTE`` have two."""
    return shapes[(place + place // len(PALETTE)) % len(shapes)]
