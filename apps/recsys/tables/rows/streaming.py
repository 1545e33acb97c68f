"""The rows of files as batches of a prediction: read and encoded piece by piece, while the model computes."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.utils.data import IterableDataset

from apps.base.checks import check_name
from apps.recsys.encoding.table_encoding import Encoding
from apps.recsys.tables.rows.batch import TableBatch
from apps.recsys.tables.rows.scoring import encoded, pieces_of_files

if TYPE_CHECKING:
    import pyarrow as pa

    from apps.recsys.readers.raw import RawTables

_PIECE_ROWS = 1 << 16
"""Rows that are encoded at a time."""


class FileRows(IterableDataset[TableBatch]):
    """The rows of CSV or Parquet files in their order, encoded, in batches.

    A thread reads and encodes the next chunk of the files while the model computes, so memory holds two chunks,
    whatever the size of the files.

    Args:
        files: the files, one after the other.
        encoding: encoding of the values.
        batch_size: rows of a batch.
        kept_columns: columns of the files that the batches carry along as they are there, with their roles, which
            messages name.
        rank: number of this process, which takes every ``num_processes``-th batch.
        num_processes: number of processes.

    Raises:
        ValueError: when rows are read: there are none, a column is missing, a value has the wrong type, a domain that
            training lacked, or a file that cannot be read.
    """

    def __init__(
        self,
        files: Sequence[Path],
        encoding: Encoding,
        batch_size: int,
        kept_columns: Mapping[str, str] = MappingProxyType({}),
        rank: int = 0,
        num_processes: int = 1,
    ) -> None:
        self.files, self.encoding, self.batch_size = files, encoding, batch_size
        self.kept_columns, self.rank, self.num_processes = kept_columns, rank, num_processes

    @property
    def roles(self) -> dict[str, str]:
        """The role of each column that the files need, by column."""
        return {**self.kept_columns, **self.encoding.roles}

    def check(self) -> None:
        """Reject files that lack a column.

        Raises:
            ValueError: naming the column, its role and the file.
        """
        from apps.recsys.readers.user_tables import check_columns

        for file in self.files:
            check_columns(file, self.roles)

    def __iter__(self) -> Iterator[TableBatch]:
        return itertools.islice(self._batches(), self.rank, None, self.num_processes)

    def _batches(self) -> Iterator[TableBatch]:
        # A number that is carried along as it is in the file is read as text, like all that is.
        numbers = [column for column in self.encoding.numbers if column not in self.kept_columns]
        size = self.batch_size * max(1, _PIECE_ROWS // self.batch_size)
        pieces, batch = pieces_of_files(self.files, self.roles, numbers, size), None
        for table, batch in encoded(pieces, self.encoding, self.batch_size):
            kept = {column: as_json_has_it(table[column]) for column in self.kept_columns}
            yield replace(batch, kept=kept or None)
        if batch is None:
            raise ValueError("the rows to predict: there are none")


def kept_of(raw: RawTables, columns: Sequence[str]) -> dict[str, pa.Array]:
    """Return ``predict_columns`` of all rows of a table.

    Raises:
        ValueError: it lacks one.
    """
    import pyarrow as pa

    tables = [table for table in (raw.train, raw.val, raw.test) if table is not None]
    for column in columns:
        check_name("predict_columns", column, tables[0].column_names)
    parts = [pa.table({column: as_json_has_it(table[column]) for column in columns}) for table in tables]
    whole = pa.concat_tables(parts, promote_options="permissive")
    return {column: whole[column].combine_chunks() for column in columns}


def as_json_has_it(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return a column's values as JSON has them: times, decimals and the like become text, NaN and infinities null."""
    import pyarrow as pa
    import pyarrow.compute as pc

    from apps.recsys.encoding.numbers import is_text, plain

    column = plain(column)
    kind = column.type
    if is_text(kind) or pa.types.is_integer(kind) or pa.types.is_boolean(kind) or pa.types.is_null(kind):
        return column
    if pa.types.is_floating(kind):
        return pc.if_else(pc.is_finite(column), column, pa.scalar(None, kind))
    values = [_plain(value) for value in column.to_pylist()]
    is_list = pa.types.is_nested(kind)
    return pa.chunked_array([pa.array(values, None if is_list else pa.string())])


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if np.isfinite(value) else None
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)
