"""Columns of an arrow table as numbers: categories as rows of an embedding table, numbers, labels.

All of it works on whole columns. What is learned from data (which values have a row, means, quantiles) is learned from
the training rows alone; a value that they lack goes to row 0.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from apps.recsys.schema import TaskConfig

if TYPE_CHECKING:
    from apps.recsys.encoding.learnt import Vocabulary

MISSING = -1
"""The code of a value that is missing."""

MAX_QUANTILES = 255
_FNV_OFFSET, _FNV_PRIME = np.uint64(0xCBF29CE484222325), np.uint64(0x100000001B3)
_EXACT_INT = 2**53  # floats up to here hold every integer

Part = tuple[str, pa.ChunkedArray]
"""One column in one of the tables, and what to call that table in a message."""


@dataclass(frozen=True)
class Codes:
    """A column of categories, before it is known which of them have a row.

    Attributes:
        codes: int64 (N,), positions in ``values``; ``MISSING`` where there is none.
        values: the distinct values as text, in the order in which they first occur.
    """

    codes: NDArray[np.int64]
    values: pa.StringArray


@dataclass(frozen=True)
class Rows:
    """A column of categories as rows of an embedding table.

    Attributes:
        rows: int32 (N,).
        num_rows: of the table, row 0 included.
        values: the value of each row from 1 on; None where several values share a row.
        unseen: bool (N,), values that the training rows lack or that are too rare there.
    """

    rows: NDArray[np.int32]
    num_rows: int
    values: pa.StringArray | None
    unseen: NDArray[np.bool_]


# ---- categories


def factorize(parts: Sequence[Part], column: str) -> Codes:
    """The distinct values of a column over all tables, as text, and which of them each row has.

    A value and its text are the same (5, 5.0 and "5"; true, "True" and "TRUE"; a time with and without zero fractions
    of a second), so that files of different types agree. Spaces around a text are not part of it; an empty text is a
    missing value, and so is NaN.

    Raises:
        ValueError: the column holds lists or other nested values, or bytes that are no UTF-8 text.
    """
    local = []
    for where, data in parts:
        if pa.types.is_nested(data.type):
            what = "list it under multi_valued, if it is a feature" if _is_list(data.type) else "not single values"
            raise ValueError(f"column {column!r} of {where} holds values of type {data.type}: {what}")
        if not pa.types.is_dictionary(data.type):
            data = data.dictionary_encode()
        data = data.unify_dictionaries()
        pieces = [np.asarray(c.indices.fill_null(MISSING), dtype=np.int64) for c in data.chunks]
        values = data.chunk(0).dictionary if data.num_chunks else pa.array([], pa.string())
        try:
            text = _text(values)
        except pa.ArrowInvalid:
            odd = values[first_failing(values, pa.string())].as_py()
            raise ValueError(f"column {column!r} of {where} holds {odd!r}, which is no UTF-8 text") from None
        local.append((np.concatenate([*pieces, np.empty(0, np.int64)]), text))
    merged = pa.chunked_array([text for _, text in local], type=pa.string()).dictionary_encode().combine_chunks()
    # The last entry is where MISSING points.
    global_code = np.asarray(merged.indices.fill_null(MISSING), dtype=np.int64)
    out, start = [], 0
    for codes, text in local:
        out.append(np.append(global_code[start : start + len(text)], MISSING)[codes])
        start += len(text)
    return Codes(np.concatenate(out), merged.dictionary)


def _text(values: pa.Array) -> pa.StringArray:
    """Distinct values as text; None where the value stands for a missing one. Different values may become equal."""
    kind = values.type
    if pa.types.is_null(kind):
        return pa.nulls(len(values), pa.string())
    if pa.types.is_floating(kind):
        numbers = np.asarray(values.cast(pa.float64()).fill_null(np.nan), dtype=np.float64)
        whole = np.isfinite(numbers) & (np.floor(numbers) == numbers) & (np.abs(numbers) < _EXACT_INT)
        as_int = pa.array(np.where(whole, numbers, 0).astype(np.int64)).cast(pa.string())
        # In the column's own precision: a float32 is 0.1, and not 0.10000000149.
        text = pc.if_else(pa.array(whole), as_int, values.cast(pa.string()))
        return pc.if_else(pa.array(np.isnan(numbers)), pa.scalar(None, pa.string()), text)
    text = values.cast(pa.string())
    if pa.types.is_temporal(kind):  # written to the unit of its type: 12:00:00.000000
        text = pc.replace_substring_regex(text, r"(:\d\d)\.0+($|[^0-9])", r"\1\2")
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_binary(kind):
        text = pc.utf8_trim_whitespace(text)
        # Whole numbers beside missing ones are often written as 5.0.
        text = pc.replace_substring_regex(text, r"^(-?(?:0|[1-9][0-9]*))\.0+$", r"\1")
        text = pc.replace_substring_regex(text, r"^(\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d)\.0+($|[^0-9])", r"\1\2")
        # Programs write booleans as True and TRUE where a column of booleans reads true.
        text = pc.if_else(pc.match_substring_regex(text, "^(?:True|TRUE|False|FALSE)$"), pc.utf8_lower(text), text)
    return pc.if_else(pc.equal(text, ""), pa.scalar(None, pa.string()), text)


def split_values(parts: Sequence[Part], column: str, separator: str) -> tuple[NDArray[np.int64], Codes]:
    """A multi-valued column: offsets (N + 1,) and the codes of all rows' values, one row after the other.

    Of a text, the pieces between separators are the values, empty ones left out. A list without values, an empty text
    and a missing one are no values at all; a missing element of a list is a missing value.

    Raises:
        ValueError: a type that is neither a list nor text.
    """
    lists = [_is_list(data.type) for _, data in parts]
    if all(lists):
        lengths = [np.asarray(pc.list_value_length(data).fill_null(0), dtype=np.int64) for _, data in parts]
        flat = factorize([(where, pc.list_flatten(data)) for where, data in parts], column)
        return offsets_of(np.concatenate(lengths)), flat
    if any(lists):
        raise ValueError(f"column {column!r} holds lists in one file and single values in another")
    # The distinct texts are cut, not the rows: genres are a few hundred texts in a million rows.
    whole = factorize(parts, column)
    pieces = pc.split_pattern(whole.values, separator)
    lengths_of_text = np.asarray(pc.list_value_length(pieces), dtype=np.int64)
    piece = factorize([("the table", pa.chunked_array([pc.list_flatten(pieces)], type=pa.string()))], column)
    kept = piece.codes != MISSING
    text_of_piece = np.repeat(np.arange(len(whole.values)), lengths_of_text)
    offsets_of_text = offsets_of(np.bincount(text_of_piece[kept], minlength=len(whole.values) + 1))
    # A missing text is the entry after the last, which has no piece.
    text = np.where(whole.codes == MISSING, len(whole.values), whole.codes)
    position, lengths_of_row = ragged(offsets_of_text, text)
    return offsets_of(lengths_of_row), Codes(piece.codes[kept][position], piece.values)


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def offsets_of(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """0 and the inclusive cumulative sum, (N + 1,)."""
    return np.concatenate((np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)))


def ragged(offsets: NDArray[np.int64], rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Positions of the values of ``rows``, one row after the other, and how many each row has."""
    lengths = offsets[rows + 1] - offsets[rows]
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    return np.repeat(offsets[rows] - (ends - lengths), lengths) + np.arange(total), lengths


def count(codes: Codes, train: NDArray[np.bool_]) -> NDArray[np.int64]:
    """How often each value occurs in the training rows, (number of values,). ``train`` is a mask of the codes."""
    mine = codes.codes[train]
    return np.bincount(mine[mine != MISSING], minlength=len(codes.values))


def to_vocabulary(codes: Codes, train: NDArray[np.bool_], min_count: int = 1) -> Rows:
    """A row for each value that the training rows have at least ``min_count`` times, the most frequent first."""
    counts = count(codes, train)
    order = np.asarray(
        pc.sort_indices(
            pa.table({"count": counts, "text": codes.values}),
            sort_keys=[("count", "descending"), ("text", "ascending")],
        ),
        dtype=np.int64,
    )
    order = order[counts[order] >= max(min_count, 1)]
    row_of = np.zeros(len(codes.values) + 1, dtype=np.int32)  # the last one is where MISSING points
    row_of[order] = np.arange(1, len(order) + 1)
    rows = row_of[codes.codes]
    unseen = (rows == 0) & (codes.codes != MISSING)
    return Rows(rows, len(order) + 1, codes.values.take(pa.array(order)), unseen)


def to_known(codes: Codes, values: Vocabulary) -> Rows:
    """The rows of a vocabulary learned elsewhere; 0 for what it lacks."""
    row_of = np.append(values.find(codes.values) + 1, 0).astype(np.int32)  # the last one is where MISSING points
    rows = row_of[codes.codes]
    return Rows(rows, len(values) + 1, None, (rows == 0) & (codes.codes != MISSING))


def to_hashed(codes: Codes, train: NDArray[np.bool_], num_rows: int) -> Rows:
    """Rows 1 to num_rows - 1 by a hash of the value, seen in training or not; 0 where it is missing."""
    row_of = np.zeros(len(codes.values) + 1, dtype=np.int32)
    row_of[:-1] = 1 + (hash_text(codes.values) % np.uint64(num_rows - 1)).astype(np.int32)
    unseen_value = np.append(count(codes, train) == 0, False)
    return Rows(row_of[codes.codes], num_rows, None, unseen_value[codes.codes])


def to_given(codes: Codes, train: NDArray[np.bool_], num_rows: int, column: str, row: NDArray[np.int64]) -> Rows:
    """The values themselves, which are row numbers already; 0 where one is missing. ``row`` is the table's row of each
    code.

    Raises:
        ValueError: a value that is no whole number from 0 to num_rows - 1, or a missing one where 0 is one of the
            values; the message names the first one.
    """
    text = codes.values
    fits = np.asarray(pc.match_substring_regex(text, r"^\d{1,10}$"), dtype=bool)
    ids = np.full(len(text), num_rows, dtype=np.int64)
    ids[fits] = np.asarray(text.filter(pa.array(fits)).cast(pa.int64()))
    bad = np.append(ids >= num_rows, False)[codes.codes]
    if bad.any():
        first = int(np.argmax(bad))
        value = text[int(codes.codes[first])].as_py()
        raise ValueError(
            f"column {column!r} holds {value!r} in row {int(row[first])}: num_rows={num_rows} takes row numbers "
            f"0 to {num_rows - 1}"
        )
    missing = codes.codes == MISSING
    if missing.any() and (ids == 0).any():
        raise ValueError(
            f"column {column!r} has no value in row {int(row[np.argmax(missing)])}, which num_rows takes as row number "
            "0, and holds 0 as well: count the values from 1, or fill in the missing ones"
        )
    unseen_value = np.append(count(codes, train) == 0, False)
    return Rows(np.append(ids, 0).astype(np.int32)[codes.codes], num_rows, None, unseen_value[codes.codes])


def utf8(values: pa.StringArray) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """Where each text begins and ends, (N + 1,), and the bytes that this points into."""
    if not len(values):
        return np.zeros(1, np.int64), np.empty(0, np.uint8)
    values = values.cast(pa.large_string())
    _, ends, data = values.buffers()
    offsets = np.frombuffer(ends, dtype=np.int64)[values.offset : values.offset + len(values) + 1]
    return offsets, np.empty(0, np.uint8) if data is None else np.frombuffer(data, dtype=np.uint8)


def hash_text(values: pa.StringArray) -> NDArray[np.uint64]:
    """A hash of each text that is the same on every machine and in every run: FNV-1a over UTF-8, mixed at the end.

    FNV-1a alone has weak low bits, which the remainder by a table's size reads; the mix is splitmix64's.
    """
    offsets, content = utf8(values)
    lengths = np.diff(offsets)
    hashes = np.full(len(values), _FNV_OFFSET, dtype=np.uint64)
    # All texts advance by one byte at a time; the longest go on alone.
    order = np.argsort(-lengths, kind="stable")
    starts, sorted_lengths = offsets[:-1][order], lengths[order]
    for position in range(int(sorted_lengths[0]) if len(order) else 0):
        alive = int(np.searchsorted(-sorted_lengths, -position, side="left"))
        byte = content[starts[:alive] + position].astype(np.uint64)
        mine = order[:alive]
        hashes[mine] = (hashes[mine] ^ byte) * _FNV_PRIME
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        hashes = (hashes ^ (hashes >> np.uint64(shift))) * np.uint64(factor)
    return hashes ^ (hashes >> np.uint64(31))


# ---- numbers


def to_numbers(
    parts: Sequence[Part], column: str, missing: str = "leave missing numbers empty", first_row: int = 0
) -> NDArray[np.float64]:
    """A column of numbers over all tables, NaN where missing.

    Args:
        parts: the tables.
        column: names it in messages.
        missing: what a message says of missing values.
        first_row: number of each table's first row in messages, where the tables are pieces of longer ones.

    Raises:
        ValueError: something that is no number; the message names the first one and its row.
    """
    out = []
    for where, data in parts:
        out.append(_numbers(data, column, where, missing, first_row))
    return np.concatenate(out)


def _numbers(data: pa.ChunkedArray, column: str, where: str, missing: str, first_row: int) -> NDArray[np.float64]:
    kind = data.type.value_type if pa.types.is_dictionary(data.type) else data.type
    if pa.types.is_dictionary(data.type):
        data = data.cast(kind)
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        data = pc.utf8_trim_whitespace(data)
        data = pc.if_else(pc.equal(data, ""), pa.scalar(None, kind), data)
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
    return np.asarray(numbers.fill_null(np.nan), dtype=np.float64)


def first_failing(data: pa.Array | pa.ChunkedArray, kind: pa.DataType) -> int:
    """The first row of texts or bytes that do not read as ``kind``, by halving; ``len(data)`` where all do."""
    low, high = 0, len(data)  # the rows before low do, and the one at high does not
    while low < high:
        middle = (low + high) // 2
        try:
            data.slice(low, middle + 1 - low).cast(kind)
            low = middle + 1
        except pa.ArrowInvalid:
            high = middle
    return low


def to_float32(numbers: NDArray[np.float64]) -> NDArray[np.float32]:
    """In float32, where NaN stands for every value that is not finite, infinities and what float32 cannot hold too."""
    with np.errstate(over="ignore"):
        out = numbers.astype(np.float32)
    out[~np.isfinite(out)] = np.nan
    return out


def to_order(parts: Sequence[Part], column: str) -> NDArray[np.int64] | NDArray[np.float64]:
    """A column of numbers, dates or times as numbers that sort alike; text that reads as one of them too.

    Raises:
        ValueError: a missing value, or something that has no order.
    """
    parts = [(where, _dates(data)) for where, data in parts]
    kinds = {str(data.type) for _, data in parts}
    if all(pa.types.is_temporal(data.type) for _, data in parts):
        unit = pa.timestamp("us")
        out = [
            np.asarray(d.cast(unit, safe=False).cast(pa.int64()).fill_null(np.iinfo(np.int64).min)) for _, d in parts
        ]
        order: Any = np.concatenate(out)
        absent = order == np.iinfo(np.int64).min
    elif any(pa.types.is_temporal(data.type) for _, data in parts):
        raise ValueError(f"column {column!r} orders the rows, but its types differ between files: {', '.join(kinds)}")
    else:
        order = to_numbers(parts, column, "times are numbers, or dates such as 2024-05-31 12:00:00")
        absent = np.isnan(order)
    if absent.any():
        raise ValueError(f"column {column!r} orders the rows, but has no value in row {int(np.argmax(absent))}")
    return order


def _dates(data: pa.ChunkedArray) -> pa.ChunkedArray:
    """Text that reads as dates or times as such, as a CSV file's is read; other columns as they are."""
    kind = data.type.value_type if pa.types.is_dictionary(data.type) else data.type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        return data
    for zone in (None, "UTC"):
        with contextlib.suppress(pa.ArrowInvalid):
            return data.cast(kind).cast(pa.timestamp("us", zone))
    return data


@dataclass(frozen=True)
class Statistics:
    """Of a continuous column in the training rows: see ``features.ContinuousFeature``."""

    mean: float
    std: float
    quantiles: tuple[float, ...]
    missing: float


def statistics(values: NDArray[np.float32]) -> Statistics:
    """Mean, deviation, bin boundaries and missing share of (N,) numbers with NaN where missing."""
    present = np.sort(values[~np.isnan(values)])
    missing = 1.0 - len(present) / max(len(values), 1)
    if not len(present):
        return Statistics(0.0, 1.0, (), missing)
    mean = float(present.mean(dtype=np.float64))
    if present[0] == present[-1]:
        return Statistics(mean, 1.0, (), missing)
    std = float(present.std(dtype=np.float64))
    return Statistics(mean, std, tuple(map(float, boundaries(present))), missing)


def boundaries(ascending: NDArray[np.float32], num_bins: int = MAX_QUANTILES + 1) -> NDArray[np.float32]:
    """Values b between bins b[i - 1] < x <= b[i] of the sorted values: at most num_bins - 1, the largest value is none.

    A value that would fill a bin has one of its own: the next smaller value is a boundary too. So 96 % zeros are one
    bin, and 40 hours a week are not mixed with 39. The bins left hold about equally many of the other values, so that
    the 4 % beside the zeros are told apart; but no bin is to hold fewer than 1 in 8,192 of all, which would be learned
    from too few.
    """
    size = len(ascending)
    values, first, times = np.unique(ascending, return_index=True, return_counts=True)
    full = times * num_bins >= size
    heavy = np.union1d(values[full], ascending[first[full] - 1][first[full] > 0])
    rest = ascending[~np.repeat(full, times)]
    bins = min(num_bins - len(heavy), len(rest) // max(size // 8192, 1))
    between = rest[np.arange(1, bins) * len(rest) // bins] if bins > 1 else rest[:0]
    found = np.union1d(heavy, between)
    found = found[found < ascending[-1]] if size else found
    return found[np.arange(num_bins - 1) * len(found) // (num_bins - 1)] if len(found) >= num_bins else found


# ---- labels


def to_labels(parts: Sequence[Part], name: str, task: TaskConfig) -> NDArray[np.float32]:
    """0 and 1 of a task over all tables, NaN where the column has no value.

    Raises:
        ValueError: a column that does not hold 0 and 1, a ``positive`` value that it never holds, or ``at_least`` for a
            column that holds no numbers.
    """
    column = task.column
    if task.at_least is not None:
        numbers = to_numbers(parts, column)
        return np.where(np.isnan(numbers), np.nan, numbers >= task.at_least).astype(np.float32)
    codes = factorize(parts, column)
    values = codes.values.to_pylist() if len(codes.values) <= 1000 else None
    if task.positive is not None:
        wanted = [_text(pa.array([value]))[0] for value in task.positive]
        positive = np.asarray(pc.is_in(codes.values, pa.array(wanted, pa.string())), dtype=bool)
        for value, text in zip(task.positive, wanted, strict=True):
            if not pc.any(pc.equal(codes.values, text)).as_py():
                some = ", ".join(map(repr, (values or codes.values[:5].to_pylist())[:5]))
                raise ValueError(f"task {name!r}: column {column!r} never holds positive={value!r}; it holds {some}")
        label = positive.astype(np.float32)
    else:
        known = {"0": 0.0, "1": 1.0, "false": 0.0, "true": 1.0}
        found = [] if values is None else [known.get(v.lower(), np.nan) for v in values]
        if values is None or any(np.isnan(found)):
            fits = pc.is_in(pc.utf8_lower(codes.values), pa.array(list(known), pa.string()))
            code = int(np.argmin(np.asarray(fits, dtype=bool)))
            odd, row = codes.values[code].as_py(), int(np.argmax(codes.codes == code))
            raise ValueError(
                f"task {name!r}: column {column!r} must hold 0 and 1, but row {row} holds {odd!r}; "
                "set positive (the values that count) or at_least"
            )
        label = np.array(found, dtype=np.float32)
    return np.append(label, np.float32(np.nan))[codes.codes]


def determines(codes: NDArray[np.int64], label: NDArray[np.float32]) -> bool:
    """Whether knowing the column is knowing the label, in every row.

    Only values that occur more than once tell: a value of its own in each row says nothing. They must cover half of the
    labelled rows and both classes, or it is no finding. Missing is a value too.
    """
    known = ~np.isnan(label)
    mine, positive = codes[known] + 1, label[known] == 1
    total = np.bincount(mine)
    hits = np.bincount(mine[positive], minlength=len(total))
    repeated = total > 1
    if 2 * int(total[repeated].sum()) < len(mine) or not len(mine):
        return False
    total, hits = total[repeated], hits[repeated]
    pure = (hits == 0) | (hits == total)
    return bool(pure.all() and 0 < hits.sum() < total.sum())
