"""Scores of a script's own rows by a trained model, from a DataFrame, an arrow table, a dict or a file.

Rows are encoded piece by piece by the checkpoint's encoding, and nothing is written. pandas is used where the rows are
its own, and is not a dependency; pyarrow is imported where it is used.
"""

from __future__ import annotations

import itertools
import logging
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from apps.base.checks import check_at_least
from apps.base.messages import excerpt, first_line
from apps.recsys.encoding.table_encoding import Encoding
from apps.recsys.schema import names_of
from apps.recsys.tables.rows.batch import TableBatch
from apps.recsys.tables.rows.rows import TableRows

if TYPE_CHECKING:
    import pyarrow as pa


_ROWS = "the rows to predict"
T = TypeVar("T")

log = logging.getLogger(__name__)

_BATCHES = 16
"""Batches that are encoded at a time."""


def predict(model: Any, rows: Any, batch_size: int) -> Any:
    """See ``MultiTaskRecommender.predict``."""
    check_at_least(1, batch_size=batch_size)
    task = model.task
    encoding = task.encoding
    rows = framed(rows, encoding.roles)
    tables = pieces(rows, encoding.roles, encoding.numbers, _BATCHES * batch_size)
    begun = list(itertools.islice(tables, 2))
    scores = like(rows, task.scores(begun if len(begun) < 2 else itertools.chain(begun, tables), batch_size))
    if is_frame(rows):
        scores.index = rows.index
    return scores


def encoding_of(model: Any) -> Mapping[str, Any]:
    """Return the encoding state of a model's checkpoint, or of the data that it is trained on.

    Raises:
        ValueError: the model has neither.
    """
    state = model.encoding_state
    if state is None:
        raise ValueError(
            f"this {type(model).__name__} does not know what its numbers stand for: load a checkpoint of its training "
            "(apps.load), or train it first"
        )
    return state


def encoded(tables: Iterable[pa.Table], encoding: Encoding, batch_size: int) -> Iterator[tuple[pa.Table, TableBatch]]:
    """Yield the rows of tables in batches, as they are and encoded; warn of rows unlike the training rows.

    A thread encodes the next table while the caller works on the batches of the one before; a list of one table needs
    none.

    Args:
        tables: the chunks of one table, with the columns of ``encoding.roles``. Their rows are counted as one table's.
        encoding: encoding of the values.
        batch_size: rows of a batch; the last one of a piece may have fewer.

    Raises:
        ValueError: a value that cannot be encoded; the message counts its row from the first table's first row.
    """
    from apps.data.array_files import ArraysInMemory
    from apps.recsys.tables.encode.new_rows import NewRows

    unlike = dict[str, Any]()

    def rows() -> Iterator[tuple[pa.Table, TableRows, int]]:
        first = 0
        for table in tables:
            columns = ArraysInMemory()
            for what, counts in NewRows(table, encoding, columns, first).unlike.items():
                unlike[what] = unlike.get(what, 0) + counts
            yield table, TableRows(columns, encoding.features, torch.arange(len(table))), first
            first += len(table)

    # A thread would take longer than to encode a row.
    is_one = isinstance(tables, Sequence) and len(tables) < 2
    for table, piece, first in rows() if is_one else one_ahead(rows()):
        for begin in range(0, len(table), batch_size):
            batch = piece[begin : begin + batch_size]
            yield table.slice(begin, batch_size), replace(batch, index_B=batch.index_B + first)
    for what, (count, may_be) in unlike.items():
        if count > may_be:
            log.warning(what, f"{int(count):,}")


def one_ahead(items: Iterator[T]) -> Iterator[T]:
    """Yield the items; a thread makes the next one while the caller works on the one before. None of them is None."""
    with ThreadPoolExecutor(1, "ahead") as thread:
        coming = thread.submit(next, items, None)
        while (item := coming.result()) is not None:
            coming = thread.submit(next, items, None)
            yield item


def pieces(rows: Any, roles: Mapping[str, str], numbers: Iterable[str], size: int) -> Iterator[pa.Table]:
    """Yield the columns of ``roles`` as tables of ``size`` rows; the last one may have fewer. Others are ignored.

    Args:
        rows: a pandas DataFrame, an arrow table or what becomes one, a mapping of columns, a list of mappings, one a
            row, or a path (a pattern too) of CSV or Parquet files.
        roles: role of each column to read; messages name it.
        numbers: columns of numbers.
        size: rows of a table.

    Raises:
        ValueError: a column is missing, doubled, of another length, or no list of values, or a file cannot be read.
    """
    import pyarrow as pa

    from apps.recsys.readers import user_tables

    if isinstance(rows, list) and rows and all(isinstance(row, Mapping) for row in rows):
        rows = {name: [row.get(name) for row in rows] for name in dict.fromkeys(itertools.chain(*rows))}
    if isinstance(rows, (str, Path)):
        yield from pieces_of_files(user_tables.find_files(None, str(rows), "rows"), roles, numbers, size)
    elif is_frame(rows):
        names = names_of(roles, list(rows.columns), _ROWS)
        for begin in range(0, len(rows), size):
            part = rows.iloc[begin : begin + size]
            yield pa.table({column: _column(column, part[own]) for column, own in names.items()})
    elif isinstance(rows, Mapping):
        columns = {column: _column(column, rows[own]) for column, own in names_of(roles, list(rows), _ROWS).items()}
        lengths = {column: len(values) for column, values in columns.items()}
        for column, length in lengths.items():
            if length != next(iter(lengths.values())):
                first = next(iter(lengths))
                raise ValueError(f"column {column!r} has {length} values, and column {first!r} {lengths[first]}")
        yield from _joined([pa.table(columns)], size)
    elif isinstance(rows, pa.Table) or hasattr(rows, "__arrow_c_stream__") or hasattr(rows, "__arrow_c_array__"):
        table = rows if isinstance(rows, pa.Table) else pa.table(rows)
        names = names_of(roles, table.column_names, _ROWS)
        yield from _joined([table.select(list(names.values())).rename_columns(list(names))], size)
    else:
        raise ValueError(
            f"rows={excerpt(rows)} are none that can be scored: give a DataFrame, an arrow table, a dict of columns, a "
            "list of dicts, or a path of CSV or Parquet files"
        )


def pieces_of_files(
    files: Sequence[Path], roles: Mapping[str, str], numbers: Iterable[str], size: int
) -> Iterator[pa.Table]:
    """Yield the columns of CSV or Parquet files, one file after the other; see ``pieces``."""
    from apps.recsys.readers import user_tables

    tables = (user_tables.iter_columns(file, roles, tuple(numbers), size) for file in files)
    yield from _joined(itertools.chain.from_iterable(tables), size)


def like(rows: Any, columns: Mapping[str, Any]) -> Any:
    """Return columns in the kind of ``rows``: a DataFrame, a dict of arrays (for files too), else an arrow table."""
    import pyarrow as pa

    plain = {name: x.numpy() if isinstance(x, torch.Tensor) else x for name, x in columns.items()}
    table = pa.table(plain)
    if is_frame(rows):
        return table.to_pandas()
    if isinstance(rows, (str, Path, Mapping)):
        return {name: table[name].to_numpy() for name in table.column_names}
    return table


def framed(rows: Any, roles: Mapping[str, str]) -> Any:
    """Return a pandas Series as a DataFrame: the one column that is read, or else a row. Others stay as they are."""
    if not hasattr(rows, "to_frame"):
        return rows
    return rows.to_frame() if rows.name in roles else rows.to_frame().T


def is_frame(rows: Any) -> bool:
    """Tell whether ``rows`` are a pandas DataFrame, without importing pandas."""
    pandas = sys.modules.get("pandas")
    return pandas is not None and isinstance(rows, pandas.DataFrame)


def _column(name: str, values: Any) -> pa.Array | pa.ChunkedArray:
    import pyarrow as pa

    if isinstance(values, (pa.Array, pa.ChunkedArray)):
        return values
    if isinstance(values, (str, bytes)) or not hasattr(values, "__len__"):
        raise ValueError(f"column {name!r} is {excerpt(values)}, not a list of values")
    if isinstance(values, torch.Tensor):
        values = values.numpy(force=True)
    if getattr(values, "ndim", 1) == 2:
        values = list(values)
    try:
        return pa.array(values, from_pandas=True)
    except (pa.ArrowException, TypeError, ValueError) as error:
        raise ValueError(
            f"column {name!r} of the rows to predict is no column of one type: {first_line(error)}"
        ) from error


def _joined(tables: Iterable[pa.Table], size: int) -> Iterator[pa.Table]:
    """Join and cut tables to ``size`` rows each; the last one may have fewer."""
    import pyarrow as pa

    rest: list[pa.Table] = []
    for table in tables:
        try:
            table = pa.concat_tables([*rest, table], promote_options="permissive")
        except pa.ArrowException as error:
            raise ValueError(f"the files to predict differ in their types: {first_line(error)}") from error
        while len(table) >= size:
            yield table.slice(0, size)
            table = table.slice(size)
        rest = [table] if len(table) else []
    yield from rest
