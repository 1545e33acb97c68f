"""Drift: how new rows differ from the rows that a model was trained on, and what suffers from it."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from apps.data.array_files import ArraysInMemory
from apps.recsys.encoding.profiles import Counts, Profile, stability_index
from apps.recsys.encoding.table_encoding import Encoding
from apps.recsys.readers.user_tables import check_columns, find_files
from apps.recsys.tables.encode.new_rows import NewRows, Written
from apps.recsys.tables.rows.scoring import pieces_of_files

_PIECE_ROWS = 1 << 16
_OUTSIDE, _SHIFTED, _INDEX, _MEAN = 0.01, 0.05, 0.1, 0.5
"""Least share of numbers outside the training's range, least rise of a share, least population stability index, and
least shift of a mean in standard deviations that are named."""


class _Counted(NewRows):
    """Rows that are encoded only to add what they hold to ``counts``."""

    def __init__(self, table: pa.Table, given: Encoding, first_row: int, counts: dict[str, Counts]) -> None:
        self.counts = counts
        super().__init__(table, given, ArraysInMemory(), first_row)

    def saw(self, own: Written) -> None:
        profile = self.given.profiles.get(own.column, Profile())
        self._add(own.column, Counts.of_categories(profile, *own.values(), own.is_missing))

    def saw_numbers(self, column: str, values_N: NDArray[np.float32]) -> None:
        self._add(column, Counts.of_numbers(self.given.profiles.get(column, Profile()), values_N))

    def _add(self, column: str, counts: Counts) -> None:
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
    for file in files:
        check_columns(file, encoding.roles)
    counts: dict[str, Counts] = {}
    first = 0
    for table in pieces_of_files(files, encoding.roles, encoding.numbers, _PIECE_ROWS):
        _Counted(table, encoding, first, counts)
        first += len(table)
    if not first:
        raise ValueError(f"data={pattern!r} has no rows")
    found = [finding for column, own in counts.items() for finding in _findings(encoding, column, own)]
    if not encoding.profiles:
        found.append((0.0, "the checkpoint is of an earlier version: it keeps no ranges, and no shares of values"))
    return [line for _, line in sorted(found, key=lambda pair: -pair[0])]


def _findings(encoding: Encoding, column: str, now: Counts) -> Iterator[tuple[float, str]]:
    """Yield lines on a column, each with the share of rows or values that it is about."""
    number = {f.name: f for f in encoding.features.continuous}.get(column)
    before, what = encoding.profiles.get(column, Profile()), f"column {column!r}"
    missing = number.missing if before.missing is None and number is not None else before.missing
    if missing is not None:
        rise = now.missing - missing
        line = f"{what}: {now.missing:.1%} of the rows have no value, {missing:.1%} in training"
        if _has_risen(missing, now.missing, now.num_rows):
            yield rise, f"{line}: their predictions rest on the other columns"
        elif _has_risen(now.missing, missing, now.num_rows):
            yield -rise, f"{line}: mean predictions and calibration shift"
    if number is None and _has_risen(before.unseen, now.odd, now.num_values):
        there = f" ({before.unseen:.1%} there)" if before.unseen else ""
        advice = "they are read as one unknown value; train again with such rows"
        yield now.odd, f"{what}: {now.odd:.1%} of the values are not in training{there}: {advice}"
        return
    if now.odd > _OUTSIDE and now.num_odd > 2:
        low, high = before.bounds
        advice = "predictions extrapolate there"
        yield now.odd, f"{what}: {now.odd:.1%} of the numbers are outside training's {low:g} to {high:g}: {advice}"
        if now.odd > _SHIFTED:  # the distribution has moved, which needs no second line
            return
    mean = "" if number is None else f"mean {now.total / max(now.num_values, 1):.4g}, {number.mean:.4g} in training"
    if before.shares and now.num_values:
        # Of n rows of the same distribution the index is about (bins - 1) / n.
        index, bins = stability_index(before.shares, now.shares), len(before.shares)
        if index > _INDEX + 2 * (bins - 1) / now.num_values:
            moved = [b - a for a, b in zip(before.shares, now.shares, strict=True)]
            how = mean or _most_moved(encoding, column, before, now, moved)
            line = f"{what}: other shares of values, population stability index {index:.2f} ({how})"
            yield sum(map(abs, moved)) / 2, f"{line}: mean predictions and calibration shift"
    elif number is not None and now.num_values:
        shift = abs(now.total / now.num_values - number.mean) / number.std
        if shift > _MEAN:
            yield min(shift, 1.0), f"{what}: {mean}, {shift:.1f} standard deviations: calibration shifts"


def _has_risen(before: float, now: float, num: int) -> bool:
    """Tell whether a share is larger than before by more than matters, and by more than chance in ``num`` rows."""
    error = max(share * (1 - share) for share in (before, now)) / max(num, 1)
    return now - before > _SHIFTED + 2 * math.sqrt(error)


def _most_moved(encoding: Encoding, column: str, before: Profile, now: Counts, moved: list[float]) -> str:
    place = max(range(len(moved)), key=lambda i: abs(moved[i]))
    sequence = next((s.items for s in encoding.features.sequences if s.name == column), None)
    vocabulary = encoding.vocabularies.get(sequence or column)
    name = "all rarer values"
    if place < len(before.rows):
        row = before.rows[place]
        name = f"row {row}" if vocabulary is None or not row else repr(vocabulary.texts()[row - 1])
    return f"{name} {now.shares[place]:.1%}, {before.shares[place]:.1%} in training"
