"""``RowGroups``: a Parquet file of columns that is written while they come."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from apps.base.files import new_file

if TYPE_CHECKING:
    import pyarrow as pa

_ROWS = 1 << 16
"""Least number of rows of a row group, but for the last."""


class RowGroups:
    """The columns so far, in a hidden file next to the whole one; memory holds one row group.

    It takes columns as long as they have the types of the first ones, and come in the order of their ``index`` if
    they have one.

    Args:
        path: path of the whole file.
    """

    def __init__(self, path: Path) -> None:
        self._output = path
        self._writer: Any = None
        self._waiting: list[pa.Table] = []
        self._last: int | None = None

    def add(self, columns: Mapping[str, Any]) -> bool:
        """Take further rows, given as tensors, lists or arrow arrays by name; return False where they do not fit.

        Raises:
            OSError: the file cannot be written.
        """
        table = _table(columns)
        if table is None or not self._follows(table):
            return False
        self._waiting.append(table)
        if sum(map(len, self._waiting)) >= _ROWS:
            self._write()
        return True

    def _follows(self, table: pa.Table) -> bool:
        import pyarrow as pa

        if self._schema not in (None, table.schema):
            return False
        if "index" in table.column_names and len(table):
            if not pa.types.is_integer(table["index"].type) or table["index"].null_count:
                return False
            index = table["index"].to_numpy()
            if (index[1:] < index[:-1]).any() or (self._last is not None and index[0] < self._last):
                return False
            self._last = int(index[-1])
        return True

    @property
    def _schema(self) -> pa.Schema | None:
        if self._writer is not None:
            return self._writer.schema
        return self._waiting[0].schema if self._waiting else None

    def _write(self) -> None:
        import pyarrow as pa
        from pyarrow import parquet

        table = pa.concat_tables(self._waiting)
        self._waiting.clear()
        if self._writer is None:
            self._path = new_file(self._output)
            self._writer = parquet.ParquetWriter(self._path, table.schema)
        self._writer.write_table(table)

    def _close(self) -> None:
        if self._waiting:
            self._write()
        if self._writer is not None:
            self._writer.close()

    def tables(self) -> Iterator[pa.Table]:
        """Yield the rows so far in chunks; nothing is added afterwards."""
        import pyarrow as pa
        from pyarrow import parquet

        self._close()
        if self._writer is not None:
            with parquet.ParquetFile(self._path) as file:
                for batch in file.iter_batches():
                    yield pa.Table.from_batches([batch])

    def become(self, path: Path) -> bool:
        """Move the rows to ``path``, as the whole file; return False where there are none."""
        self._close()
        if self._writer is None:
            return False
        with open(self._path, "rb") as file:
            os.fsync(file.fileno())
        os.replace(self._path, path)
        return True

    def delete(self) -> None:
        """Delete the hidden file."""
        if self._writer is not None:
            with contextlib.suppress(OSError):  # a full disk raises once more
                self._writer.close()
            self._path.unlink(missing_ok=True)


def _table(columns: Mapping[str, Any]) -> pa.Table | None:
    """Return columns as a table; None if arrow has no type for one of them."""
    import pyarrow as pa

    try:
        return pa.table({name: _array(values) for name, values in columns.items()})
    except (pa.ArrowException, TypeError, ValueError):
        return None


def _array(values: Any) -> Any:
    import pyarrow as pa

    if not isinstance(values, Tensor):
        return values if isinstance(values, (pa.Array, pa.ChunkedArray)) else pa.array(values)
    numbers = (values.float() if values.dtype is torch.bfloat16 else values).numpy(force=True)
    if numbers.ndim < 2:
        return pa.array(numbers)
    if numbers.ndim > 2:
        raise ValueError(f"a tensor of {numbers.ndim} dimensions is no column")
    bounds = np.arange(len(numbers) + 1, dtype=np.int32) * numbers.shape[1]
    return pa.ListArray.from_arrays(pa.array(bounds), pa.array(numbers.ravel()))
