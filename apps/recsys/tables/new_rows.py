"""The encoding of rows without labels by what a training has learned, such as the rows of a prediction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from apps.data.array_files import ArraysInMemory, ArrayWriter
from apps.recsys.encoding.categories import (
    MISSING,
    Codes,
    factorize,
    split_values,
    to_given,
    to_hashed,
    to_known,
)
from apps.recsys.encoding.features import (
    CategoricalFeature,
    SequenceFeature,
    VectorFeature,
)
from apps.recsys.encoding.numbers import (
    Part,
    to_float32,
    to_numbers,
    to_vectors,
)
from apps.recsys.encoding.sequences import last_values, without_row_0
from apps.recsys.encoding.table_encoding import Encoding
from apps.recsys.encoding.texts import with_vectors
from apps.recsys.encoding.timestamps import is_far, with_parts
from apps.recsys.schema import timestamp_columns


def build_rows(
    table: pa.Table, given: Encoding, writer: ArrayWriter | ArraysInMemory, first_row: int = 0
) -> dict[str, NDArray[Any]]:
    """Encode rows that have no label, and are in no split, by ``given``, and finish ``writer``.

    Args:
        table: the rows, with the columns of ``given.roles``.
        given: encoding of the values.
        writer: receiver of the arrays.
        first_row: number of the first row in messages, where the table is a piece of a longer one.

    Returns:
        for each warning that the rows may need, how many values are unlike those of training, and how many may be.

    Raises:
        ValueError: a value has a wrong type, or ``given`` lacks a domain.
    """
    unlike: dict[str, NDArray[Any]] = {}
    num_rows, where = len(table), "the rows to predict"
    table = with_vectors(with_parts(table, given.timestamps, where, first_row), given.texts, where)

    for name, times in given.timestamps.items():
        if times is not None:
            begin, end = np.array(times).astype("datetime64[D]")
            what = f"column {name!r}: times outside those of training, {begin} to {end}, by more than their length: %s"
            unlike[what] = np.array([is_far(table[timestamp_columns(name)[2]].to_numpy(), times).sum(), 0])

    def parts(column: str) -> list[Part]:
        return [(where, table.column(column))]

    def rows_of(
        feature: CategoricalFeature | SequenceFeature, codes: Codes, row: NDArray[np.int64]
    ) -> NDArray[np.int32]:
        items = getattr(feature, "items", None) or feature.name
        if items in given.vocabularies:
            return to_known(codes, given.vocabularies[items]).rows
        train = np.zeros(len(codes.codes), dtype=bool)
        if feature.hashed:
            return to_hashed(codes, train, feature.num_rows).rows
        return to_given(codes, train, feature.num_rows, feature.name, row).rows

    features = given.features
    single = [f for f in features.categorical if not f.multi_valued]
    matrix = writer.create("categorical", (num_rows, len(single)), np.int32)
    for f, feature in enumerate(single):
        codes = factorize(parts(feature.name), feature.name)
        matrix[:, f] = rows_of(feature, codes, first_row + np.arange(num_rows))
    for i, feature in enumerate(f for f in features.categorical if f.multi_valued):
        offsets, codes = split_values(parts(feature.name), feature.name, given.separator)
        writer.save(f"multi{i}_offsets", offsets)
        row = first_row + np.repeat(np.arange(num_rows), np.diff(offsets))
        writer.save(f"multi{i}_values", rows_of(feature, codes, row))
    for i, sequence in enumerate(features.sequences):
        offsets, codes = split_values(parts(sequence.name), sequence.name, given.separator)
        offsets, position = last_values(offsets, sequence.length)
        row = first_row + np.repeat(np.arange(num_rows), np.diff(offsets))
        rows = rows_of(sequence, Codes(codes.codes[position], codes.values), row)
        what = f"column {sequence.name!r}: most values, %s, are not in training: are they written alike there?"
        unlike[what] = np.array([((rows == 0) & (codes.codes[position] != MISSING)).sum(), len(rows) / 2])
        save_sequence(writer, i, offsets, rows)
    dense = writer.create("dense", (num_rows, len(features.continuous)), np.float32)
    for c, column in enumerate(features.continuous):
        numbers = to_numbers(parts(column.name), column.name, first_row=first_row)
        dense[:, c] = to_float32(numbers)
    if features.vectors:
        matrix = writer.create("vectors", (num_rows, sum(f.size for f in features.vectors)), np.float32)
        for place, vector in zip(vector_places(features.vectors), features.vectors, strict=True):
            matrix[:, place] = to_vectors(parts(vector.name), vector.name, vector.size, first_row)
    writer.save("label", np.full((num_rows, len(features.tasks)), np.nan, np.float32))
    if given.domain is not None and given.domains is not None:
        codes = factorize(parts(given.domain), given.domain)
        known = to_known(codes, given.domains)
        writer.save("domain", domain_numbers(codes, known.rows, given.domain, first_row))
    writer.finish({"num_rows": num_rows})
    return unlike


def save_sequence(
    writer: ArrayWriter | ArraysInMemory, number: int, offsets: NDArray[np.int64], rows: NDArray[np.int32]
) -> None:
    """Write a column of sequences without the values that have no row."""
    offsets, rows = without_row_0(offsets, rows)
    writer.save(f"sequence{number}_offsets", offsets)
    writer.save(f"sequence{number}_values", rows)


def domain_numbers(codes: Codes, rows: NDArray[np.int32], column: str, first_row: int = 0) -> NDArray[np.int32]:
    """Return domains counted from 0, made of ``rows``, in which 0 stands for a value that training lacks.

    Raises:
        ValueError: there is such a value; the message names the first one and its row.
    """
    bad = rows == 0
    if bad.any():
        row = int(np.argmax(bad))
        code = int(codes.codes[row])
        what = "no value" if code == MISSING else f"{codes.values[code].as_py()!r}, which training lacks,"
        raise ValueError(f"column {column!r} names the domain, but holds {what} in row {first_row + row}")
    return rows - 1


def vector_places(vectors: Sequence[VectorFeature]) -> list[slice]:
    """Return where each column of vectors stands among their numbers side by side."""
    ends = np.cumsum([f.size for f in vectors]).tolist()
    return [slice(end - f.size, end) for f, end in zip(vectors, ends, strict=True)]
