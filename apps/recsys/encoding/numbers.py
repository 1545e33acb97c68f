"""Columns of numbers and of times, and the statistics of numbers that a model needs."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from apps.recsys.encoding.features import ContinuousFeature

Part = tuple[str, pa.ChunkedArray]
"""One column in one of the tables, and what to call that table in a message."""

MAX_QUANTILES = 255

NO_VALUE = ("", "NA", "N/A", "#N/A", "NaN", "nan", "NULL", "null", "None", "NaT", "?")
"""Texts among numbers and times that stand for a missing value. Among categories they are values."""


def to_numbers(
    parts: Sequence[Part], column: str, missing: str = "leave missing numbers empty", first_row: int = 0
) -> NDArray[np.float64]:
    """Return a column of numbers over all tables, NaN if missing.

    Args:
        parts: the column in each table.
        column: name of the column in messages.
        missing: advice on missing values, the end of a message.
        first_row: number of each table's first row in messages, if the tables are chunks of longer ones.

    Raises:
        ValueError: a value is not a number; the message names the first one and its row.
    """
    return np.concatenate([_numbers(data, column, where, missing, first_row) for where, data in parts])


def _numbers(data: pa.ChunkedArray, column: str, where: str, missing: str, first_row: int) -> NDArray[np.float64]:
    data = plain(data)
    kind = data.type
    if is_text(kind):
        data = known_text(data)
    elif pa.types.is_boolean(kind):
        data = data.cast(pa.int8())
    elif not (
        pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind) or pa.types.is_null(kind)
    ):
        raise ValueError(f"column {column!r} of {where} holds values of type {kind}, not numbers")
    try:
        numbers = data.cast(pa.float64(), safe=False)
    except pa.ArrowInvalid:
        row = first_failing(data, pa.float64())
        odd = data[row].as_py()
        raise ValueError(
            f"column {column!r} of {where} must hold numbers: row {first_row + row} holds {odd!r}; {missing}"
        ) from None
    return np.asarray(numbers.fill_null(np.nan) if numbers.null_count else numbers, dtype=np.float64)


def known_text(data: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return text of numbers or times without spaces around it, and null for what programs write for no value."""
    text = pc.utf8_trim_whitespace(data)
    return pc.if_else(pc.is_in(text, pa.array(NO_VALUE, text.type)), pa.scalar(None, text.type), text)


def plain(data: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return a column by its values where it is stored as places in a dictionary, or its text as views."""
    data = data.cast(data.type.value_type) if pa.types.is_dictionary(data.type) else data
    return data.cast(pa.string()) if pa.types.is_string_view(data.type) else data


def is_text(kind: pa.DataType) -> bool:
    """Return whether a column of this type holds text."""
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def first_failing(data: pa.Array | pa.ChunkedArray, kind: pa.DataType) -> int:
    """Return the first row of texts or bytes that do not read as ``kind``, by halving; ``len(data)`` where all do."""
    low, high = 0, len(data)  # the rows before low can be read, and the one at high cannot
    while low < high:
        middle = (low + high) // 2
        try:
            data.slice(low, middle + 1 - low).cast(kind)
            low = middle + 1
        except pa.ArrowInvalid:
            high = middle
    return low


_FORMS_OF_DATES = (
    (r"^(\d{1,2})\.(\d{1,2})\.(\d{4})", r"\3-\2-\1"),
    (r"^(\d{1,2})/(\d{1,2})/(\d{4})", r"\3-\1-\2"),
    (r"^(\d{4})/(\d{1,2})/(\d{1,2})", r"\1-\2-\3"),
    (r"^(\d{4})-(\d)-", r"\1-0\2-"),
    (r"^(\d{4}-\d\d)-(\d)($|[ T])", r"\1-0\2\3"),
    (r"^(\d{4}-\d\d-\d\d[ T])(\d):", r"\10\2:"),
    (r"(\d) ?(?:UTC|GMT)$", r"\1Z"),
)

_ISO = r"^\d{4}-\d\d-\d\d(?:[ T]\d\d:[0-9:.]*Z?)?$"


def with_iso_dates(text: Any) -> Any:
    """Return an array of text in which dates at the start are as Arrow reads them, 2024-05-31.

    They may be written 2024/5/31, 31.5.2024 or 5/31/2024, with a time behind them. A row says by itself what it means:
    dots have the day first, slashes the month.
    """
    if pc.all(pc.match_substring_regex(text, _ISO)).as_py() is not False:
        return text
    for form, iso in _FORMS_OF_DATES:
        text = pc.replace_substring_regex(text, form, iso)
    return text


def to_float32(numbers: NDArray[np.float64]) -> NDArray[np.float32]:
    """Return numbers as float32, with NaN for infinities and for numbers that float32 cannot hold."""
    with np.errstate(over="ignore"):
        out = numbers.astype(np.float32)
    out[~np.isfinite(out)] = np.nan
    return out


def to_order(parts: Sequence[Part], column: str) -> NDArray[np.int64] | NDArray[np.float64]:
    """Return a column of numbers, dates or times, or of text that reads as them, as numbers that sort alike.

    Raises:
        ValueError: a value is missing or has no order.
    """
    parts = [(where, _dates(data)) for where, data in parts]
    temporal = [pa.types.is_temporal(data.type) for _, data in parts]
    if all(temporal):
        absent_time = np.iinfo(np.int64).min
        times = (data.cast(pa.timestamp("us"), safe=False).cast(pa.int64()) for _, data in parts)
        order: Any = np.concatenate([np.asarray(time.fill_null(absent_time)) for time in times])
        absent = order == absent_time
    elif any(temporal):
        kinds = ", ".join({str(data.type) for _, data in parts})
        raise ValueError(f"column {column!r} orders the rows, but its types differ between files: {kinds}")
    else:
        order = to_numbers(parts, column, "times are numbers, or dates such as 2024-05-31 12:00:00")
        absent = np.isnan(order)
    if absent.any():
        raise ValueError(f"column {column!r} orders the rows, but has no value in row {int(np.argmax(absent))}")
    return order


def _dates(data: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return text that reads as dates or times as timestamps, and other columns as they are."""
    data = plain(data)
    if is_text(data.type):
        text = with_iso_dates(data)
        for zone in (None, "UTC"):
            with contextlib.suppress(pa.ArrowInvalid):
                return text.cast(pa.timestamp("us", zone))
    return data


def statistics(name: str, values: NDArray[np.float32]) -> ContinuousFeature:
    """Return the feature of a column with these values (N,) in the training rows, NaN if missing."""
    present = np.sort(values[~np.isnan(values)])
    missing = 1.0 - len(present) / max(len(values), 1)
    if not len(present):
        return ContinuousFeature(name, missing=missing)
    mean = float(present.mean(dtype=np.float64))
    if present[0] == present[-1]:
        return ContinuousFeature(name, mean, missing=missing)
    std = float(present.std(dtype=np.float64))
    quantiles = tuple(map(float, boundaries(present)))
    return ContinuousFeature(name, mean, std, quantiles, missing, float(present[0]), float(present[-1]))


def boundaries(ascending: NDArray[np.float32], num_bins: int = MAX_QUANTILES + 1) -> NDArray[np.float32]:
    """Return at most num_bins - 1 values b between bins ``b[i - 1] < x <= b[i]`` of sorted values.

    The largest value is not a boundary. A value that would fill a bin has one of its own: the next smaller value is a
    boundary too. So 96 % zeros are one bin, and 40 hours a week are not mixed with 39. The other bins share the
    remaining values about equally, and none of them holds fewer than 1 in 8,192 of all values, from which too little
    could be learned.
    """
    size = len(ascending)
    values, first, times = np.unique(ascending, return_index=True, return_counts=True)
    full = times * num_bins >= size
    heavy = np.union1d(values[full], ascending[first[full] - 1][first[full] > 0])
    rest = ascending[~np.repeat(full, times)]
    bins = min(num_bins - len(heavy), len(rest) // max(size // 8192, 1))
    between = rest[np.arange(1, bins) * len(rest) // bins] if bins > 1 else rest[:0]
    edges = np.union1d(heavy, between)
    edges = edges[edges < ascending[-1]] if size else edges
    return edges[np.arange(num_bins - 1) * len(edges) // (num_bins - 1)] if len(edges) >= num_bins else edges


def to_vectors(parts: Sequence[Part], column: str, size: int | None = None, first_row: int = 0) -> NDArray[np.float32]:
    """Return a column of vectors over all tables, (N, size), NaN if one is missing.

    Args:
        parts: the column in each table.
        column: name of the column in messages.
        size: numbers in a vector; None: as many as the first one has.
        first_row: number of each table's first row in messages, if the tables are chunks of longer ones.

    Raises:
        ValueError: a value is not a list of numbers, a vector has another length, or holds a number that is not finite.
    """
    vectors = []
    for where, data in parts:
        kind = plain(data).type
        if not (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)):
            advice = ": a vector is a list, which a CSV file cannot hold" if is_text(kind) else ""
            raise ValueError(f"column {column!r} of {where} holds values of type {kind}, not lists of numbers{advice}")
        item = kind.value_type
        if not (pa.types.is_integer(item) or pa.types.is_floating(item)):
            raise ValueError(f"column {column!r} of {where} holds lists of {item}, not of numbers")
        # A list with a missing number is not a vector of its length.
        length_N = np.asarray(pc.list_value_length(data).fill_null(-1), dtype=np.int64)
        is_there_N = length_N >= 0
        if size is None and is_there_N.any():
            size = int(length_N[is_there_N][0])
        wrong_N = is_there_N & (length_N != size)
        if wrong_N.any() or size == 0:
            row = int(np.argmax(wrong_N))
            rule = f"{size}, as the others have" if size else "at least one number"
            raise ValueError(
                f"column {column!r} of {where}: the vector in row {first_row + row} has {length_N[row]} numbers, and "
                f"must have {rule}"
            )
        own = np.full((len(data), size or 0), np.nan, np.float32)
        flat = np.asarray(pc.list_flatten(data).cast(pa.float32()).fill_null(np.nan), dtype=np.float32)
        own[is_there_N] = flat.reshape(-1, size) if size else 0
        bad_N = is_there_N & ~np.isfinite(own).all(1)
        if bad_N.any():
            row = int(np.argmax(bad_N))
            raise ValueError(
                f"column {column!r} of {where}: the vector in row {first_row + row} holds a number that is missing or "
                "not finite"
            )
        vectors.append(own)
    if size is None:
        raise ValueError(f"column {column!r} holds no vector in any row")
    # A table without any vector came before the first one that tells the length.
    return np.concatenate([own if own.shape[1] else np.full((len(own), size), np.nan, np.float32) for own in vectors])


def vector_scale(vectors_NS: NDArray[np.float32]) -> float:
    """Return the root mean square of the numbers of the vectors that are there; 1 if there is none, or all are 0."""
    there_nS = vectors_NS[~np.isnan(vectors_NS[:, 0])]
    scale = float(np.sqrt(np.square(there_nS, dtype=np.float64).mean())) if len(there_nS) else 0.0
    return scale or 1.0
