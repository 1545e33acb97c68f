"""Drift: how new rows differ from the rows that a model was trained on, and what suffers from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from apps.data.array_files import ArraysInMemory
from apps.recsys.encoding.profiles import Counts, Profile, stability_index
from apps.recsys.encoding.table_encoding import Encoding
from apps.recsys.readers.user_tables import find_files
from apps.recsys.tables.encode.new_rows import NewRows, Written
from apps.recsys.tables.rows.scoring import pieces_of_files

_PIECE_ROWS = 1 << 16
_OUTSIDE, _SHIFTED, _INDEX, _MEAN = 0.01, 0.05, 0.1, 0.5
"""Least share of numbers outside the training's range, least rise of a share, least population stability index, and
least shift of a mean in standard deviations that are named."""
_SHIFT = "mean predictions and calibration shift"


class _Counted(NewRows):
    """Rows that are encoded only to add what they hold to ``counts``."""

    def __init__(self, table: pa.Table, given: Encoding, first_row: int, counts: dict[str, Counts]) -> None:
        self.counts = counts
        super().__init__(table, given, ArraysInMemory(), first_row)

    def observe(self, own: Written) -> None:
        self._add(own.column, Counts.of_categories, *own.categories())

    def saw_numbers(self, column: str, values_N: NDArray[np.float32]) -> None:
        self._add(column, Counts.of_numbers, values_N)

    def _add(self, column: str, count: Callable[..., Counts], *values: NDArray[Any]) -> None:
        counts = count(self.given.profiles.get(column, Profile()), *values)
        self.counts[column] = self.counts[column] + counts if column in self.counts else counts


def drift(encoding: Encoding, pattern: str) -> list[str]:
    """Return a line for each column in which new rows differ from the training rows, the largest difference first.

    Args:
        encoding: the encoding of the training rows.
        pattern: path, or a pattern of paths, of CSV or Parquet files.

    Raises:
        ValueError: a file lacks a column, or holds a value that cannot be encoded, or there is no row.
    """
    files = find_files(None, pattern, "data")
    counts, first = dict[str, Counts](), 0
    for table in pieces_of_files(files, encoding.roles, encoding.numbers, _PIECE_ROWS):
        _Counted(table, encoding, first, counts)
        first += len(table)
    if not first:
        raise ValueError(f"data={pattern!r} has no rows")
    found = [finding for column, own in counts.items() for finding in _findings(encoding, column, own)]
    return [line for _, line in sorted(found, key=lambda pair: -pair[0])]


def _findings(encoding: Encoding, column: str, now: Counts) -> Iterator[tuple[float, str]]:
    """Yield lines on a column, each with the share of rows or values that it is about."""
    number = {f.name: f for f in encoding.features.continuous}.get(column)
    before, what = encoding.profiles.get(column, Profile()), f"column {column!r}"
    missing = number.missing if before.missing is None and number is not None else before.missing
    if missing is not None and _differ(missing, now.missing, now.num_rows):
        suffers = "their predictions rest on the other columns" if now.missing > missing else _SHIFT
        line = f"{now.missing:.1%} of the rows have no value, {missing:.1%} in training"
        yield abs(now.missing - missing), f"{what}: {line}: {suffers}"
    if not now.num_values:
        return
    is_odd = now.odd > _OUTSIDE and now.num_odd > 2
    if number is None:
        is_odd = now.odd > before.unseen and _differ(before.unseen, now.odd, now.num_values)
    if is_odd:
        line = f"{now.odd:.1%} of the values are not in training: they are read as one unknown value"
        if number is not None:
            low, high = before.bounds
            line = f"{now.odd:.1%} of the values are outside training's {low:g} to {high:g}: predictions extrapolate"
        yield now.odd, f"{what}: {line}"
        if now.odd > _SHIFTED:  # the distribution has moved, which needs no second line
            return
    mean = now.total / now.num_values
    if before.shares:
        # Of n rows of the same distribution the index is about (bins - 1) / n.
        index, bins = stability_index(before.shares, now.shares), len(before.shares)
        if index > _INDEX + 2 * (bins - 1) / now.num_values:
            moved = [abs(b - a) for a, b in zip(before.shares, now.shares, strict=True)]
            how = _most_moved(encoding, column, before, now, moved)
            how = how if number is None else f"mean {mean:.4g}, {number.mean:.4g} in training"
            line = f"other shares of values, population stability index {index:.2f} ({how})"
            yield sum(moved) / 2, f"{what}: {line}: {_SHIFT}"
    elif number is not None and (shift := abs(mean - number.mean) / number.std) > _MEAN:
        line = f"mean {mean:.4g}, {number.mean:.4g} in training, {shift:.1f} standard deviations"
        yield min(shift, 1.0), f"{what}: {line}: {_SHIFT}"


def _differ(before: float, now: float, num: int) -> bool:
    """Tell whether two shares differ by more than matters, and by more than chance in ``num`` rows."""
    error = max(share * (1 - share) for share in (before, now)) / max(num, 1)
    return abs(now - before) > _SHIFTED + 2 * math.sqrt(error)


def _most_moved(encoding: Encoding, column: str, before: Profile, now: Counts, moved: list[float]) -> str:
    """Return the shares of the category that has changed most, here and in training."""
    place, rows = int(np.argmax(moved)), (*before.rows, -1)
    items = {s.name: s.items for s in encoding.features.sequences}.get(column) or column
    texts = encoding.vocabularies[items].texts() if items in encoding.vocabularies else ()
    name = "all rarer values" if rows[place] < 0 else f"row {rows[place]}"
    name = repr(texts[rows[place] - 1]) if 0 < rows[place] <= len(texts) else name
    return f"{name} {now.shares[place]:.1%}, {before.shares[place]:.1%} in training"
