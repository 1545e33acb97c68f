"""The encoding of a table's features, column by column, and of rows without labels, such as rows to predict."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from apps.data.array_files import ArraysInMemory, ArrayWriter
from apps.recsys.encoding.categories import (
    MISSING,
    CategoryRows,
    Codes,
    factorize,
    split_values,
    to_given,
    to_hashed,
    to_known,
)
from apps.recsys.encoding.features import SequenceFeature
from apps.recsys.encoding.numbers import Part, to_float32, to_numbers, to_vectors
from apps.recsys.encoding.sequences import last_values, without_row_0
from apps.recsys.encoding.table_encoding import Encoding
from apps.recsys.encoding.texts import with_vectors
from apps.recsys.encoding.timestamps import is_far, with_parts
from apps.recsys.schema import SequenceConfig, timestamp_columns

_WHERE = "the rows to predict"


@dataclass(frozen=True)
class Written:
    """A categorical column that has been written.

    Attributes:
        column: its name.
        codes: its values; of a sequence those that are read.
        rows: their rows.
        lengths: number of values of each row of the table; None: one each.
        num_longer: number of sequences of which only the last values are read.
    """

    column: str
    codes: Codes
    rows: CategoryRows
    lengths: NDArray[np.int64] | None = None
    num_longer: int = 0

    def categories(self, kept: NDArray[np.bool_] | None = None) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        """Return the row of each value that is there, whether the vocabulary lacks it, and which rows of the table have
        no value; ``kept`` chooses some of these rows."""
        there = self.codes.codes != MISSING
        is_missing = ~there if self.lengths is None else self.lengths == 0
        if kept is not None:
            of_value = kept if self.lengths is None else np.repeat(kept, self.lengths)
            there, is_missing = there & of_value, is_missing[kept]
        return self.rows.rows[there], self.rows.rows[there] == 0, is_missing


class ColumnWriter:
    """Encodes the columns of features and writes them as the arrays of a table, one column at a time.

    Attributes:
        writer: receiver of the arrays.
        num_rows: rows of all tables.
        separator: text between the values of a list.
        first_row: number of the first row in messages, if the table is a chunk of a longer one.
    """

    writer: ArrayWriter | ArraysInMemory
    num_rows: int
    separator: str
    first_row: int = 0

    def parts(self, column: str) -> list[Part]:
        """Return a column of the tables."""
        raise NotImplementedError

    def rows_of(self, column: str, items: str, codes: Codes, lengths: NDArray[np.int64] | None) -> CategoryRows:
        """Return the rows of a column's values in the table of the column ``items``; ``lengths`` as in ``Written``."""
        raise NotImplementedError

    def write_single(self, columns: Sequence[str]) -> Iterator[Written]:
        """Write the categorical columns of one value per row."""
        matrix = self.writer.create("categorical", (self.num_rows, len(columns)), np.int32)
        for f, column in enumerate(columns):
            codes = factorize(self.parts(column), column)
            written = Written(column, codes, self.rows_of(column, column, codes, None))
            matrix[:, f] = written.rows.rows
            yield written

    def write_lists(self, columns: Mapping[str, SequenceConfig | SequenceFeature | None]) -> Iterator[Written]:
        """Write multi-valued columns, which are given for None, then sequences, without the values that have no row."""
        numbers = {"multi": itertools.count(), "sequence": itertools.count()}
        for column, sequence in columns.items():
            offsets, codes = split_values(self.parts(column), column, self.separator)
            whole, items, array = np.diff(offsets), column, "multi"
            if sequence is not None:
                offsets, position = last_values(offsets, sequence.length)
                codes = Codes(codes.codes[position], codes.values)
                items, array = sequence.items or column, "sequence"
            lengths = np.diff(offsets)
            rows = self.rows_of(column, items, codes, lengths)
            saved = (offsets, rows.rows) if sequence is None else without_row_0(offsets, rows.rows)
            array += str(next(numbers[array]))
            self.writer.save(f"{array}_offsets", saved[0])
            self.writer.save(f"{array}_values", saved[1])
            yield Written(column, codes, rows, lengths, int((whole > lengths).sum()))

    def write_numbers(self, columns: Sequence[str]) -> Iterator[tuple[str, NDArray[np.float32]]]:
        """Write the continuous columns."""
        matrix = self.writer.create("dense", (self.num_rows, len(columns)), np.float32)
        for c, column in enumerate(columns):
            matrix[:, c] = values = to_float32(to_numbers(self.parts(column), column, first_row=self.first_row))
            yield column, values

    def write_vectors(self, sizes: Mapping[str, int | None]) -> dict[str, NDArray[np.float32]]:
        """Write the columns of vectors side by side, given the sizes that are known."""
        made = {c: to_vectors(self.parts(c), c, size, self.first_row) for c, size in sizes.items()}
        if made:
            shape = self.num_rows, sum(vectors.shape[1] for vectors in made.values())
            np.concatenate(list(made.values()), axis=1, out=self.writer.create("vectors", shape, np.float32))
        return made


class NewRows(ColumnWriter):
    """Rows that have no label and are in no split, encoded as in training.

    Args:
        table: the rows, with the columns of ``given.roles``.
        given: encoding of the values.
        writer: receiver of the arrays, which is finished.
        first_row: number of the first row in messages, if the table is a chunk of a longer one.

    Attributes:
        unlike: for each warning that the rows may need, how many values are unlike the training values, and how many
            may be.

    Raises:
        ValueError: a value has a wrong type, or ``given`` lacks a domain.
    """

    def __init__(
        self, table: pa.Table, given: Encoding, writer: ArrayWriter | ArraysInMemory, first_row: int = 0
    ) -> None:
        self.given, self.writer, self.num_rows, self.first_row = given, writer, len(table), first_row
        self.separator = given.separator
        self.table = with_vectors(with_parts(table, given.timestamps, _WHERE, first_row), given.texts, _WHERE)
        self.unlike: dict[str, NDArray[Any]] = {}
        for name, times in given.timestamps.items():
            if times is not None:
                begin, end = np.array(times).astype("datetime64[D]")
                what = f"column {name!r}: times outside those of training, {begin} to {end}, by more than their length"
                num_far = is_far(self.table[timestamp_columns(name)[2]].to_numpy(), times).sum()
                self.unlike[f"{what}: %s"] = np.array([num_far, 0])
        features = given.features
        several = dict.fromkeys(f.name for f in features.several) | {f.name: f for f in features.sequences}
        for own in (*self.write_single([f.name for f in features.single]), *self.write_lists(several)):
            self.observe(own)
            if several.get(own.column):
                what = f"column {own.column!r}: most values, %s, are not in training: are they written alike there?"
                is_unknown = (own.rows.rows == 0) & (own.codes.codes != MISSING)
                self.unlike[what] = np.array([is_unknown.sum(), len(is_unknown) / 2])
        for column, values in self.write_numbers([f.name for f in features.continuous]):
            self.saw_numbers(column, values)
        self.write_vectors({f.name: f.size for f in features.vectors})
        writer.save("label", np.full((self.num_rows, len(features.tasks)), np.nan, np.float32))
        if given.domain is not None and given.domains is not None:
            codes = factorize(self.parts(given.domain), given.domain)
            rows = to_known(codes, given.domains).rows
            writer.save("domain", domain_numbers(codes, rows, given.domain, first_row))
        writer.finish({"num_rows": self.num_rows})

    def observe(self, own: Written) -> None:
        """Look at a categorical column that has been written; for subclasses."""

    def saw_numbers(self, column: str, values_N: NDArray[np.float32]) -> None:
        """Look at a column of numbers that has been written; for subclasses."""

    def parts(self, column: str) -> list[Part]:
        return [(_WHERE, self.table.column(column))]

    def rows_of(self, column: str, items: str, codes: Codes, lengths: NDArray[np.int64] | None) -> CategoryRows:
        if items in self.given.vocabularies:
            return to_known(codes, self.given.vocabularies[items])
        features = self.given.features
        feature = next(f for f in (*features.single, *features.several) if f.name == column)
        train = np.zeros(len(codes.codes), dtype=bool)
        if feature.hashed:
            return to_hashed(codes, train, feature.num_rows)
        row = self.first_row + np.repeat(np.arange(self.num_rows), 1 if lengths is None else lengths)
        return to_given(codes, train, feature.num_rows, column, row)


def domain_numbers(codes: Codes, rows: NDArray[np.int32], column: str, first_row: int = 0) -> NDArray[np.int32]:
    """Return domains counted from 0, made of ``rows``, in which 0 marks a value that training lacks.

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
