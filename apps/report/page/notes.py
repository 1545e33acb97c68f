"""Where the notes of points stand in a file, so that they cover little."""

from __future__ import annotations

import itertools
import math

from apps.report.page.charts import ScatterChart

_DIRECTIONS = ((1, 0), (1, -1), (0, -1), (-1, -1), (-1, 0), (-1, 1), (0, 1), (1, 1))
"""Places of a note beside its point, the best first: to the right, and up."""
_LETTER, _LINE = 5.2, 10.0
"""Width of a letter and height of a line of a note, in pixels."""


def placed(chart: ScatterChart, width: float, height: float) -> list[tuple[float, float]]:
    """Return how far the middle of each note stands from its point, to the right and down, in pixels.

    A note stands where it covers the least of points and of the notes before it.
    """
    drawn_x = [x for p in chart.points for x in (p.left, p.right) if x is not None] + [x for x, _ in chart.front]
    drawn_y = [y for p in chart.points for y in (p.low, p.high) if y is not None] + [y for _, y in chart.front]
    xs = _pixels([p.x for p in chart.points], drawn_x, width, 24, chart.log_x)
    ys = _pixels([p.y for p in chart.points], drawn_y, height, 16, False)
    ys = ys if chart.is_reversed else [height - y for y in ys]
    lefts, rights = (
        _pixels([end or p.x for p, end in zip(chart.points, ends, strict=True)], drawn_x, width, 24, chart.log_x)
        for ends in ([p.left for p in chart.points], [p.right for p in chart.points])
    )
    bars = zip(lefts, rights, ys, strict=True)
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in zip(xs, ys, strict=True)]
    taken += [(left, y - 1, right, y + 1) for left, right, y in bars]
    offsets = []
    for point, x, y in zip(chart.points, xs, ys, strict=True):
        half, best = _LETTER * len(point.note) / 2, None
        for far, (right, down) in itertools.product((8, 15, 23), _DIRECTIONS):
            dx, dy = right * (far + half), down * (far + _LINE / 2)
            box = (x + dx - half, y + dy - _LINE / 2, x + dx + half, y + dy + _LINE / 2)
            covered = sum(b[0] < box[2] and box[0] < b[2] and b[1] < box[3] and box[1] < b[3] for b in taken)
            covered += box[0] < 0 or box[2] > width or box[1] < 0 or box[3] > height
            if best is None or covered < best[0]:
                best = (covered, box, (dx, dy))
        assert best is not None
        offsets.append(best[2])
        taken += [best[1]] if point.note else []
    return offsets


def _pixels(values: list[float], others: list[float], length: float, margin: float, is_log: bool) -> list[float]:
    """Return the places of values on an axis that spans them and ``others``."""
    scale = math.log10 if is_log else float
    low, high = scale(min(values + others)), scale(max(values + others))
    return [margin + (length - 2 * margin) * (scale(v) - low) / ((high - low) or 1.0) for v in values]
