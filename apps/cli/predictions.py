"""A file of predictions, written as they come: JSON lines, CSV or Parquet by its ending, whole or not at all."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import itertools
import json
import os
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from apps.base.files import naming, replacing

_CHUNK = 8192
"""Rows of a Parquet row group."""


class PredictionFile(Callback):
    """Writes the predictions of a trainer's pass to a file, in the order of their ``index`` where all have one.

    The rows go to a hidden file beside it first, a JSON line each; ``finish`` makes the file of it. So memory holds one
    batch, and where batches come in another order than their indices, 16 bytes a row.

    Args:
        path: the file, which ends in .jsonl, .csv or .parquet.
        preview: so many rows are kept to be shown.
    """

    def __init__(self, path: Path, preview: int = 3) -> None:
        self.path, self.preview = path, preview
        self.num_rows = 0
        self.first: list[str] = []
        """The first rows in the file's order, as JSON."""
        self._rows_path = path.with_name(f".{path.name}.rows.tmp")
        self._file: BinaryIO | None = None
        self._indexed = self._in_order = True
        self._last: Any = None
        self._widths: dict[str, int | None] = {}  # of a column of lists the longest, by name
        self._schema: Any = None

    @contextlib.contextmanager
    def open(self) -> Iterator[PredictionFile]:
        """Take rows inside; the file is there once the block has ended without an error.

        Raises:
            OSError: it cannot be written.
            ValueError: values that Parquet has no type for.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(self._rows_path, "w+b")  # noqa: SIM115 - closed below, where a full disk raises once more
        try:
            yield self
            with naming(self.path):
                self._finish()
        finally:
            with contextlib.suppress(OSError):
                self._file.close()
            self._rows_path.unlink(missing_ok=True)

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self.add(rows_of(outputs))

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write further rows of plain values."""
        assert self._file is not None
        rows = list(rows)
        for row in rows:
            index = row.get("index")
            self._indexed &= isinstance(index, int)
            self._in_order &= self._indexed and (self._last is None or self._last <= index)
            self._last = index
            for name, value in row.items():
                width = len(value) if isinstance(value, list) else None
                self._widths[name] = max(filter(None, (self._widths.get(name), width)), default=None)
            with naming(self.path):
                self._file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
        self.num_rows += len(rows)
        if self.path.suffix == ".parquet" and rows:
            self._add_schema(rows)

    def _add_schema(self, rows: Sequence[Mapping[str, Any]]) -> None:
        import pyarrow as pa

        try:
            schema = pa.Table.from_pylist(rows).schema
            known = [] if self._schema is None else [self._schema]
            self._schema = pa.unify_schemas([*known, schema], promote_options="permissive")
        except pa.ArrowException as error:
            raise ValueError(
                f"{self.path} cannot hold these predictions ({error}): give a file ending in .jsonl"
            ) from error

    def _finish(self) -> None:
        assert self._file is not None
        self._file.flush()
        if self.path.suffix == ".jsonl" and (self._in_order or not self._indexed):  # the rows are the file
            os.fsync(self._file.fileno())
            self.first = [line.decode().rstrip("\n") for line in itertools.islice(self._lines(), self.preview)]
            os.replace(self._rows_path, self.path)
        elif self.path.suffix == ".jsonl":
            with replacing(self.path, "wb") as file:
                file.writelines(self._shown())
        elif self.path.suffix == ".csv":
            with replacing(self.path, newline="") as file:
                self._write_csv(file)
        else:
            with replacing(self.path, "wb") as file:
                self._write_parquet(file)

    def _lines(self) -> Iterator[bytes]:
        """The rows in the order in which they were added."""
        assert self._file is not None
        self._file.seek(0)
        yield from self._file

    def _shown(self) -> Iterator[bytes]:
        """The rows in the order of the file; the first are kept."""
        for number, line in enumerate(self._by_index() if self._indexed and not self._in_order else self._lines()):
            if number < self.preview:
                self.first.append(line.decode().rstrip("\n"))
            yield line

    def _by_index(self) -> Iterator[bytes]:
        import numpy as np

        assert self._file is not None
        index, offset, position = array("q"), array("q"), 0
        for line in self._lines():
            index.append(json.loads(line)["index"])
            offset.append(position)
            position += len(line)
        for number in np.argsort(np.asarray(index), kind="stable"):
            self._file.seek(offset[number])
            yield self._file.readline()

    def _rows(self) -> Iterator[dict[str, Any]]:
        return (json.loads(line) for line in self._shown())

    def _write_csv(self, file: Any) -> None:
        """A column of lists becomes one a place: ``label_1, probability_1, label_2, probability_2``."""
        header: list[str] = []
        for width, group in itertools.groupby(self._widths, key=self._widths.__getitem__):
            names = list(group)
            header += names if width is None else [f"{name}_{i + 1}" for i in range(width) for name in names]
        writer = csv.DictWriter(file, header, restval="", lineterminator="\n")
        writer.writeheader()
        for row in self._rows():
            cells: dict[str, Any] = {}
            for name, value in row.items():
                if isinstance(value, list):
                    cells |= {f"{name}_{i + 1}": _cell(item) for i, item in enumerate(value)}
                elif self._widths[name] is None:
                    cells[name] = _cell(value)
                elif value is not None:
                    cells[f"{name}_1"] = _cell(value)
            writer.writerow(cells)

    def _write_parquet(self, file: Any) -> None:
        import pyarrow as pa
        from pyarrow import parquet

        schema = self._schema or pa.schema([])
        with parquet.ParquetWriter(file, schema) as writer:
            rows = self._rows()
            while chunk := list(itertools.islice(rows, _CHUNK)):
                writer.write_table(pa.Table.from_pylist(chunk, schema))


def _cell(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (list, dict)) else value


def rows_of(batch: Any) -> Iterator[dict[str, Any]]:
    """Return the predictions of a batch, an example each, as plain values.

    Args:
        batch: what ``predict_step`` returns: a dataclass, mapping or named tuple of columns, or one tensor.
    """
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        columns = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    elif isinstance(batch, Mapping):
        columns = dict(batch)
    elif hasattr(batch, "_asdict"):
        columns = batch._asdict()
    else:
        columns = {"output": batch}
    plain = {k: v.tolist() if isinstance(v, Tensor) else list(v) for k, v in columns.items() if v is not None}
    for values in zip(*plain.values(), strict=True):
        yield dict(zip(plain, values, strict=True))
