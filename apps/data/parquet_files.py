"""Parquet files are read with the limit of archives: a few bytes of them may repeat a value a million times."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from apps.base.inflate import check_unpacked


def open_parquet(path: Path) -> Any:
    """Return a ``pyarrow.parquet.ParquetFile`` whose footer tells of no more than the file's size explains.

    Texts and bytes, also those in lists, are read as dictionaries: a text that a page repeats is in memory once.

    Raises:
        ValueError: the pages or the values take too much memory; see ``check_unpacked``.
    """
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        groups = [file.metadata.row_group(i) for i in range(file.metadata.num_row_groups)]
        columns = [file.schema.column(j) for j in range(file.metadata.num_columns)]
    pages, values = sum(group.total_byte_size for group in groups), 0
    for j, column in enumerate(columns):  # a value takes at least 4 bytes in memory
        values += max(4, column.length) * sum(max(group.num_rows, group.column(j).num_values) for group in groups)
    for unpacked, what in ((pages, "bytes of pages"), (values, "bytes of rows")):
        check_unpacked(path.name, path.stat().st_size, unpacked, what)
    texts = [c.path for c in columns if c.physical_type == "BYTE_ARRAY" and c.logical_type.type != "DECIMAL"]
    return pq.ParquetFile(path, read_dictionary=texts)


def parquet_tables(path: Path, columns: Callable[[list[str]], Sequence[str]], num_rows: int) -> Iterator[Any]:
    """Yield the rows of a Parquet file as arrow tables of ``num_rows``, with the types of the file's own schema.

    ``columns`` returns the columns that are read, of all names.

    Raises:
        ValueError: as in ``open_parquet``; or the texts repeat more than the file's size explains.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    with open_parquet(path) as file:
        schema, unpacked = pq.read_schema(path), 0
        # Arrow makes no views of a dictionary, so that such columns stay one.
        plain = {field.name: field for field in schema if "_view" not in str(field.type)}
        for batch in file.iter_batches(num_rows, columns=list(columns(schema.names))):
            unpacked += sum(map(_unpacked_size, batch.columns))
            check_unpacked(path.name, path.stat().st_size, unpacked)
            table = pa.Table.from_batches([batch])
            if batch.num_columns:  # a table cast to no column has no row
                table = table.cast(pa.schema([plain.get(own.name, own) for own in batch.schema]))
            yield table


def read_parquet(path: Path) -> Any:
    """Return all rows of a Parquet file as one table; see ``parquet_tables``."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    tables = [*parquet_tables(path, lambda names: names, 1 << 16)]
    return pa.concat_tables(tables) if tables else pq.read_schema(path).empty_table()


def _unpacked_size(array: Any) -> int:
    """Return the bytes of an arrow array's values, with each text of a dictionary as often as it comes."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_dictionary(array.type):
        return pc.sum(pc.binary_length(array.dictionary).take(array.indices)).as_py() or 0
    if pa.types.is_struct(array.type):
        return sum(map(_unpacked_size, array.flatten()))
    return _unpacked_size(array.values) if pa.types.is_nested(array.type) else array.nbytes
