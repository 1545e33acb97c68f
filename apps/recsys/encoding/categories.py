"""Columns of categories as rows of an embedding table.

Everything learned from data, such as which values have a row, is learned only from the training rows; a value that they
lack goes to row 0.
"""

from __future__ import annotations

import ast
import contextlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from apps.recsys.encoding.numbers import Part, first_failing, is_text
from apps.recsys.encoding.vocabulary import Vocabulary, short_decimals, utf8

MISSING = -1
"""The code of a value that is missing."""

_FNV_OFFSET, _FNV_PRIME = np.uint64(0xCBF29CE484222325), np.uint64(0x100000001B3)
_BOOLEANS = pa.array(["True", "TRUE", "False", "FALSE"])
_EXACT_INT = 2**53  # floats up to here hold every integer


@dataclass(frozen=True)
class Codes:
    """A column of categories, before it is known which of them have a row.

    Attributes:
        codes: int64 (N,), positions in ``values``; ``MISSING`` if there is none.
        values: distinct values as text, in the order in which they first occur.
    """

    codes: NDArray[np.int64]
    values: pa.StringArray


@dataclass(frozen=True)
class CategoryRows:
    """A column of categories as rows of an embedding table.

    Attributes:
        rows: row numbers, int32 (N,).
        num_rows: rows of the table, row 0 included.
        values: the value of each row from 1 on; None if several values share a row.
        unseen: bool (N,), True for values that the training rows lack or that are too rare there.
    """

    rows: NDArray[np.int32]
    num_rows: int
    values: pa.StringArray | None
    unseen: NDArray[np.bool_]


def factorize(parts: Sequence[Part], column: str) -> Codes:
    """Return the distinct values of a column over all tables, as text, and which of them each row has.

    A value and its text are the same (5, 5.0 and "5"; true, "True" and "TRUE"; a time with and without zero fractions
    of a second), so that files of different types agree. Spaces around a text are not part of it; an empty text is a
    missing value, and so is NaN.

    Raises:
        ValueError: the column holds lists or other nested values, or bytes that are not UTF-8 text.
    """
    local = []
    for where, data in parts:
        if pa.types.is_nested(data.type):
            advice = "; a feature of lists stands under multi_valued" if is_list(data.type) else ""
            what = f"it must have one value a row{advice}"
            raise ValueError(f"column {column!r} of {where} holds values of type {data.type}: {what}")
        if not pa.types.is_dictionary(data.type):
            data = data.dictionary_encode()
        data = data.unify_dictionaries()
        pieces = [np.asarray(c.indices.fill_null(MISSING), dtype=np.int64) for c in data.chunks]
        values = data.chunk(0).dictionary if data.num_chunks else pa.array([], pa.string())
        try:
            text = to_text(values)
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


def to_text(values: pa.Array) -> pa.StringArray:
    """Return distinct values as text, None for NaN and empty text. Different values may become equal."""
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
    if pa.types.is_decimal(kind):
        text = short_decimals(text)
    if pa.types.is_temporal(kind):  # written to the unit of its type: 12:00:00.000000
        text = pc.replace_substring_regex(text, r"(:\d\d)\.0+($|[^0-9])", r"\1\2")
    if is_text(kind) or pa.types.is_binary(kind):
        text = pc.utf8_trim_whitespace(text)
        # Expressions are looked for where they can be: to compile them takes longer than the rest of a row.
        if pc.any(pc.match_substring(text, ".0")).as_py():
            # Integers in a column with missing values are often written as 5.0.
            text = pc.replace_substring_regex(text, r"^(-?(?:0|[1-9][0-9]*))\.0+$", r"\1")
            text = pc.replace_substring_regex(text, r"^(\d{4}-\d\d-\d\d[ T]\d\d:\d\d:\d\d)\.0+($|[^0-9])", r"\1\2")
        # Programs write booleans as True and TRUE where a column of booleans reads true.
        text = pc.if_else(pc.is_in(text, value_set=_BOOLEANS), pc.utf8_lower(text), text)
    return pc.if_else(pc.equal(text, ""), pa.scalar(None, pa.string()), text)


def split_values(parts: Sequence[Part], column: str, separator: str) -> tuple[NDArray[np.int64], Codes]:
    """Return a multi-valued column: offsets (N + 1,) and the codes of all rows' values, one row after the other.

    A text that ``as_list`` reads is a list. Another text is cut at the separators, and empty parts are left out. A list
    without values, an empty text and a missing one have no values at all; a missing element of a list is a missing
    value.

    Raises:
        ValueError: a type that is neither a list nor text.
    """
    lists = [is_list(data.type) for _, data in parts]
    if all(lists):
        lengths = [np.asarray(pc.list_value_length(data).fill_null(0), dtype=np.int64) for _, data in parts]
        flat = factorize([(where, pc.list_flatten(data)) for where, data in parts], column)
        return offsets_of(np.concatenate(lengths)), flat
    if any(lists):
        raise ValueError(f"column {column!r} holds lists in one file and single values in another")
    # The distinct texts are cut, not the rows: genres are a few hundred texts in a million rows.
    whole = factorize(parts, column)
    listed = [as_list(text) for text in whole.values.to_pylist()]
    pieces = pc.split_pattern(whole.values, separator)
    if any(own is not None for own in listed):
        cut = zip(listed, pieces.to_pylist(), strict=True)
        pieces = pa.array([own if texts is None else texts for texts, own in cut], pieces.type)
    lengths_of_text = np.asarray(pc.list_value_length(pieces), dtype=np.int64)
    piece = factorize([("the table", pa.chunked_array([pc.list_flatten(pieces)], type=pa.string()))], column)
    text_of_piece = np.repeat(np.arange(len(whole.values)), lengths_of_text)
    kept = (piece.codes != MISSING) | np.array([own is not None for own in listed], dtype=bool)[text_of_piece]
    offsets_of_text = offsets_of(np.bincount(text_of_piece[kept], minlength=len(whole.values) + 1))
    # A missing text is the entry after the last, which has no piece.
    text = np.where(whole.codes == MISSING, len(whole.values), whole.codes)
    position, lengths_of_row = ragged(offsets_of_text, text)
    return offsets_of(lengths_of_row), Codes(piece.codes[kept][position], piece.values)


def as_list(text: str) -> list[str | None] | None:
    """Return the values of a list as Python and JSON write it and NumPy prints it, as text; None for other text."""
    if not (text.startswith("[") and text.endswith("]")):
        return None
    # NumPy has no commas between values.
    text = re.sub(r"(['\"])\s+(?=['\"])" if "'" in text or '"' in text else r"([\d.])\s+(?=[-\d])", r"\1, ", text)
    plain = text if '"' in text or "\\" in text else text.replace("'", '"')  # JSON is read 20 times as fast
    for read, own in ((json.loads, plain), (ast.literal_eval, text)):
        with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            values = read(own)
            if all(value is None or isinstance(value, (str, int, float)) for value in values):
                return [None if value is None or value != value else str(value) for value in values]
    return None


def is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def offsets_of(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return 0 and the inclusive cumulative sum, (N + 1,)."""
    return np.concatenate((np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)))


def ragged(offsets: NDArray[np.int64], rows: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the positions of the values of ``rows``, one row after the other, and how many each row has."""
    lengths = offsets[rows + 1] - offsets[rows]
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    return np.repeat(offsets[rows] - (ends - lengths), lengths) + np.arange(total), lengths


def count(codes: Codes, train: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Return how often each value occurs in the training rows. ``train`` is a mask of the codes."""
    in_train = codes.codes[train]
    return np.bincount(in_train[in_train != MISSING], minlength=len(codes.values))


def to_vocabulary(codes: Codes, train: NDArray[np.bool_], min_count: int = 1) -> CategoryRows:
    """Give a row to each value that the training rows have at least ``min_count`` times, the most frequent first."""
    return to_extended(codes, train, Vocabulary.of(pa.array([], pa.string())), min_count)


def to_extended(codes: Codes, train: NDArray[np.bool_], known: Vocabulary, min_count: int = 1) -> CategoryRows:
    """Keep the rows of a vocabulary, and give the next ones to further values as ``to_vocabulary`` does.

    Returns:
        the rows; ``values`` has only the further values.
    """
    counts = count(codes, train)
    order = np.asarray(
        pc.sort_indices(
            pa.table({"count": counts, "text": codes.values}),
            sort_keys=[("count", "descending"), ("text", "ascending")],
        ),
        dtype=np.int64,
    )
    row_of = np.append(known.find(codes.values) + 1, 0).astype(np.int32)  # the last one is where MISSING points
    order = order[(counts[order] >= max(min_count, 1)) & (row_of[order] == 0)]
    row_of[order] = len(known) + np.arange(1, len(order) + 1)
    rows = row_of[codes.codes]
    unseen = (rows == 0) & (codes.codes != MISSING)
    return CategoryRows(rows, len(known) + len(order) + 1, codes.values.take(pa.array(order)), unseen)


def to_known(codes: Codes, values: Vocabulary) -> CategoryRows:
    """Return each value's row in a vocabulary that was learned from other rows; 0 for values that it lacks."""
    row_of = np.append(values.find(codes.values) + 1, 0).astype(np.int32)  # the last one is where MISSING points
    rows = row_of[codes.codes]
    return CategoryRows(rows, len(values) + 1, None, (rows == 0) & (codes.codes != MISSING))


def to_hashed(codes: Codes, train: NDArray[np.bool_], num_rows: int) -> CategoryRows:
    """Give each value, seen in training or not, a row from 1 to num_rows - 1 by a hash; a missing one has row 0."""
    row_of = np.zeros(len(codes.values) + 1, dtype=np.int32)
    row_of[:-1] = 1 + (hash_text(codes.values) % np.uint64(num_rows - 1)).astype(np.int32)
    unseen_value = np.append(count(codes, train) == 0, False)
    return CategoryRows(row_of[codes.codes], num_rows, None, unseen_value[codes.codes])


def to_given(
    codes: Codes, train: NDArray[np.bool_], num_rows: int, column: str, row: NDArray[np.int64]
) -> CategoryRows:
    """Take the values as row numbers; a missing one has row 0. ``row`` is the table's row of each code, for messages.

    Raises:
        ValueError: a value that is not an integer from 0 to num_rows - 1, or a missing one where 0 is one of the
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
    return CategoryRows(np.append(ids, 0).astype(np.int32)[codes.codes], num_rows, None, unseen_value[codes.codes])


def hash_text(values: pa.StringArray) -> NDArray[np.uint64]:
    """Hash each text alike on every machine and in every run: FNV-1a over UTF-8, mixed at the end.

    FNV-1a by itself has weak low bits, which the remainder by a table's size reads; the mix is splitmix64's.
    """
    offsets, content = utf8(values)
    lengths = np.diff(offsets)
    hashes = np.full(len(values), _FNV_OFFSET, dtype=np.uint64)
    # All texts advance by one byte at a time; only the longest continue.
    order = np.argsort(-lengths, kind="stable")
    starts, sorted_lengths = offsets[:-1][order], lengths[order]
    for position in range(int(sorted_lengths[0]) if len(order) else 0):
        alive = int(np.searchsorted(-sorted_lengths, -position, side="left"))
        byte = content[starts[:alive] + position].astype(np.uint64)
        longer = order[:alive]
        hashes[longer] = (hashes[longer] ^ byte) * _FNV_PRIME
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        hashes = (hashes ^ (hashes >> np.uint64(shift))) * np.uint64(factor)
    return hashes ^ (hashes >> np.uint64(31))
