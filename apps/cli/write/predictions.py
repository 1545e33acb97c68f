"""Writers of predictions: they print them, or make a file whose ending says its format, whole or not at all."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import hashlib
import itertools
import json
import sys
import time
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from apps.base.files import delete_leftovers, naming, replacing
from apps.base.progress import bar
from apps.cli.write.partial import Partial
from apps.cli.write.row_groups import RowGroups
from apps.report.tables import csv_cell
from apps.train.checkpoint.contents import FOR_TRAINING, fingerprint
from apps.train.checkpoint.linked import LinkedModule
from apps.train.publish.predicting import Prediction, PredictionStream

_CHUNK = 8192
"""Rows of a Parquet row group."""
_NOTED_EVERY = 60.0
"""Seconds between two notes of progress where there is no terminal."""


class PredictionFile(Callback):
    """A callback that writes predictions to a file, in the order of their ``index`` if all rows have one.

    The rows go to a file next to it first, a JSON line each, or lines of text; the file is made of it in the end. So
    memory holds one batch, and, if batches come in another order than their indices, 16 bytes per row. The columns of a
    Trainer's predictions go to a Parquet file as they are, if they come in their order (``RowGroups``).

    Args:
        path: the file, which ends in .jsonl, .csv, .parquet or .txt.
        preview: number of rows that are kept to be shown.
        raw_csv: whether a CSV file has texts as they are, and not as ``csv_cell`` makes them.
        partial: options of ``Partial``, if a run can continue after a stopped one.

    Attributes:
        first: the first rows in the file's order, as JSON.
        num_rows: number of predictions in the file.
        start: number of rows that an earlier run has left.
    """

    def __init__(self, path: Path, preview: int = 3, raw_csv: bool = False, **partial: Any) -> None:
        self.path, self.preview, self.raw_csv, self._options = path, preview, raw_csv, partial
        self.num_rows = self.start = 0
        self.first: list[str] = []
        self._indexed = self._in_order = True
        self._last: Any = None
        self._widths: dict[str, int | None] = {}  # length of the longest list by column
        self._schema: Any = None
        # A run that may continue a stopped one needs the lines.
        self._groups = RowGroups(path) if path.suffix == ".parquet" and not partial else None

    @contextlib.contextmanager
    def open(self) -> Iterator[PredictionFile]:
        """Take rows inside; the file is there once the block has ended without an error.

        Raises:
            OSError: it cannot be written.
            ValueError: values that Parquet has no type for; see ``Partial``.
        """
        delete_leftovers(self.path)
        with naming(self.path):
            self._partial = Partial(self.path, **self._options)
        with self._partial, contextlib.ExitStack() as stack:
            if self._groups is not None:
                stack.callback(self._groups.delete)
            self.start = self.num_rows = self._partial.start
            if self.start and not self._is_text:
                for chunk in _chunks(map(json.loads, self._lines())):
                    self._look_at(chunk)
            yield self
            with naming(self.path):
                self._finish()

    @property
    def _is_text(self) -> bool:
        return self.path.suffix == ".txt"

    def on_predict_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        self.add_columns(columns_of(outputs))

    def add_columns(self, columns: Mapping[str, Any]) -> None:
        """Write further rows, given as tensors, lists or arrow arrays by column."""
        if self._groups is not None:
            with naming(self.path):
                is_taken = self._groups.add(columns)
            if is_taken:
                if len(self.first) < self.preview:
                    head = {name: values[: self.preview - len(self.first)] for name, values in columns.items()}
                    self.first += [json.dumps(row, ensure_ascii=False) for row in rows_of(head)]
                self.num_rows += len(next(iter(columns.values()), ()))
                return
        self.add(rows_of(columns))

    def _leave_groups(self, groups: RowGroups) -> None:
        """Write the rows so far as lines, which may be of any types and in any order."""
        self._groups, self.num_rows, self.first = None, 0, []
        with naming(self.path):
            for table in groups.tables():
                self.add(rows_of({name: table[name] for name in table.column_names}))
        groups.delete()

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Write further rows of plain values."""
        if self._groups is not None:
            self._leave_groups(self._groups)
        rows = list(rows)
        self._look_at(rows)
        for row in rows:
            self._write(json.dumps(row, ensure_ascii=False))
        self.num_rows += len(rows)

    def write(self, stream: PredictionStream) -> None:
        """Write the predictions of a stream, from the first that is not there yet; notes of progress go to stderr."""
        for prediction in watched(stream.predict(self.start), stream.count(), True, self.start):
            if self._is_text:
                self._write("\n".join(prediction.texts))
                self.num_rows += 1
            else:
                self.add([prediction.row])
            if (prediction.index + 1) % stream.chunk == 0:
                with naming(self.path):
                    self._partial.save(prediction.index + 1)

    def _write(self, line: str) -> None:
        with naming(self.path):
            self._partial.file.write(line.encode() + b"\n")

    def _look_at(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Take note of the order of rows, and of their columns."""
        for row in rows:
            index = row.get("index")
            self._indexed &= isinstance(index, int)
            self._in_order &= self._indexed and (self._last is None or self._last <= index)
            self._last = index
            for name, value in row.items():
                width = len(value) if isinstance(value, list) else None
                self._widths[name] = max(filter(None, (self._widths.get(name), width)), default=None)
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
        if self._groups is not None and self._groups.become(self.path):
            return
        is_whole = self._is_text or (self.path.suffix == ".jsonl" and (self._in_order or not self._indexed))
        if is_whole:
            if not self._is_text:
                self.first = [line.decode().rstrip("\n") for line in itertools.islice(self._lines(), self.preview)]
            self._partial.become(self.path)
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
        """Yield the rows in the order in which they were added."""
        self._partial.file.seek(0)
        yield from iter(self._partial.file.readline, b"")  # delegating to the file would close it with the generator

    def _shown(self) -> Iterator[bytes]:
        """Yield the rows in the order of the file, and keep the first."""
        for number, line in enumerate(self._by_index() if self._indexed and not self._in_order else self._lines()):
            if number < self.preview:
                self.first.append(line.decode().rstrip("\n"))
            yield line

    def _by_index(self) -> Iterator[bytes]:
        import numpy as np

        index, offset, position = array("q"), array("q"), 0
        for line in self._lines():
            index.append(json.loads(line)["index"])
            offset.append(position)
            position += len(line)
        for number in np.argsort(np.asarray(index), kind="stable"):
            self._partial.file.seek(offset[number])
            yield self._partial.file.readline()

    def _rows(self) -> Iterator[dict[str, Any]]:
        return (json.loads(line) for line in self._shown())

    def _write_csv(self, file: Any) -> None:
        """Write a column of lists as a column for each place: ``label_1, probability_1, label_2, probability_2``."""
        header: list[str] = []
        for width, group in itertools.groupby(self._widths, key=self._widths.__getitem__):
            names = list(group)
            header += names if width is None else [f"{name}_{i + 1}" for i in range(width) for name in names]
        writer = csv.DictWriter(file, header, restval="", lineterminator="\n")
        quoted = (lambda value: value) if self.raw_csv else csv_cell
        writer.writerow({name: quoted(name) for name in header})
        for row in self._rows():
            cells: dict[str, Any] = {}
            for name, value in row.items():
                if isinstance(value, list):
                    cells |= {f"{name}_{i + 1}": _cell(item) for i, item in enumerate(value)}
                elif self._widths[name] is None:
                    cells[name] = _cell(value)
                elif value is not None:
                    cells[f"{name}_1"] = _cell(value)
            writer.writerow({name: quoted(value) for name, value in cells.items()})

    def _write_parquet(self, file: Any) -> None:
        import pyarrow as pa
        from pyarrow import parquet

        schema = self._schema or pa.schema([])
        with parquet.ParquetWriter(file, schema) as writer:
            for chunk in _chunks(self._rows()):
                writer.write_table(pa.Table.from_pylist(chunk, schema))


def _chunks(rows: Iterator[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    while chunk := list(itertools.islice(rows, _CHUNK)):
        yield chunk


def _cell(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, (list, dict)) else value


def shortened(line: str, longest: int = 16) -> str:
    """Return a row of JSON for people: of a list of more than ``longest`` values, such as a vector, the first four."""
    row = json.loads(line)
    long = {name for name, value in row.items() if isinstance(value, list) and len(value) > longest}
    if not long:
        return line

    def written(name: str, value: Any) -> str:
        if name not in long:
            return json.dumps(value, ensure_ascii=False)
        first = json.dumps(value[:4], ensure_ascii=False)
        return f"{first[:-1]}, ... {len(value) - 4:,} more]"

    return "{" + ", ".join(f"{json.dumps(name)}: {written(name, value)}" for name, value in row.items()) + "}"


def columns_of(batch: Any) -> dict[str, Any]:
    """Return the predictions of a batch by column: tensors, arrow arrays or sequences of one length.

    Args:
        batch: return value of ``predict_step``: a dataclass, mapping or named tuple of columns, or one tensor.
    """
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        columns = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    elif isinstance(batch, Mapping):
        columns = dict(batch)
    elif hasattr(batch, "_asdict"):
        columns = batch._asdict()
    else:
        columns = {"output": batch}
    return {name: values for name, values in columns.items() if values is not None}


def rows_of(batch: Any) -> Iterator[dict[str, Any]]:
    """Return the predictions of a batch, an example each, as plain values; see ``columns_of``."""
    plain = {name: _plain(values) for name, values in columns_of(batch).items()}
    for values in zip(*plain.values(), strict=True):
        yield dict(zip(plain, values, strict=True))


def _plain(values: Any) -> list[Any]:
    if isinstance(values, Tensor):
        return values.tolist()
    return values.to_pylist() if hasattr(values, "to_pylist") else list(values)


# ---- streams


def print_stream(stream: PredictionStream, path: Path | None = None) -> int:
    """Print the texts of a stream as they come, and return the number of inputs they answer; a terminal sees them grow.

    Args:
        stream: the stream.
        path: file for its rows, whole or not at all, over an earlier one; None: there is none.
    """
    hidden, count, shown = not sys.stdout.isatty(), 0, ""

    def tell(text: str) -> None:
        nonlocal shown
        if text.startswith(shown):
            print(text[len(shown) :], end="", flush=True)
            shown = text

    with contextlib.ExitStack() as stack:
        file = None if path is None else stack.enter_context(PredictionFile(path).open())
        predictions = stream.predict(0, tell) if stream.tells and not hidden else stream.predict(0)
        for prediction in watched(predictions, stream.count() if hidden else None, hidden):
            for text in prediction.texts:
                print(text[len(shown) :] if text.startswith(shown) else f"\n{text}", flush=True)
                shown = ""
            if file is not None:
                file.add([prediction.row])
            count += 1
    return count


def write_stream(model: nn.Module, stream: PredictionStream, path: Path, **options: Any) -> PredictionFile:
    """Write a stream to a file, and resume a stopped run of the same model, inputs and options.

    Args:
        model: the model that predicts.
        stream: its predictions.
        path: the file.
        options: ``overwrite`` and ``raw_csv`` of ``PredictionFile``.

    Raises:
        OSError: the file cannot be written.
        ValueError: lines of another run, or a run that writes them now.
    """
    arguments = dict(model.hparams) if isinstance(model, LinkedModule) else {}  # others' need not be plain values
    kept = {name: value for name, value in arguments.items() if name not in (*FOR_TRAINING, "decode")}
    digest = hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]
    made_of = {"weights": fingerprint(model), "model": digest, **stream.made_of}
    with PredictionFile(path, made_of=made_of, compatible_values=stream.compatible_values, **options).open() as file:
        file.write(stream)
    return file


def watched(
    predictions: Iterator[Prediction], total: int | None, shown: bool, start: int = 0, stream: TextIO | None = None
) -> Iterator[Prediction]:
    """Yield predictions, with a bar of how many are done on a terminal, else with a note each minute.

    Args:
        predictions: the predictions as they come.
        total: their number; None: it is not known.
        shown: whether there are a bar and notes.
        start: number of predictions that were done before.
        stream: file for both; None: stderr.
    """
    stream = sys.stderr if stream is None else stream
    if shown and stream.isatty():
        from rich.console import Console

        with bar("predictions", total, Console(file=stream)) as own:
            own.skip(start)
            for prediction in predictions:
                yield prediction
                own.advance()
        return
    begun = noted = time.monotonic()
    of = "" if total is None else f" of {total:,}"
    for count, prediction in enumerate(predictions, 1):
        yield prediction
        now = time.monotonic()
        if shown and now - noted >= _NOTED_EVERY:
            noted = now
            note = f"{start + count:,}{of} predictions, {count / (now - begun):.3g} a second"
            print(note, file=stream, flush=True)
