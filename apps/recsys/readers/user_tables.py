"""Readers of a user's own CSV or Parquet files: arrow tables of the columns that have a role."""

from __future__ import annotations

import codecs
import contextlib
import glob
import io
import itertools
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
from lightning.pytorch.utilities import rank_zero_only

from apps.base.inflate import Inflated
from apps.data.parquet_files import open_parquet
from apps.data.store import identity
from apps.recsys.encoding.numbers import first_failing
from apps.recsys.readers.raw import RawTables
from apps.recsys.schema import TableConfig, names_of, nearest

log = logging.getLogger(__name__)

_SEPARATORS = {".csv": ",", ".tsv": "\t"}
_SERIAL = pa.csv.ReadOptions(use_threads=False)  # only then an error of the layout names the row
_TEXT = pa.dictionary(pa.int32(), pa.string())
_UNREADABLE = (pa.ArrowException, OSError, EOFError)
_COMPRESSED = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd", ".lz4": "lz4"}


def find_files(root: str | None, name: str, option: str) -> list[Path]:
    """Return the file ``name``, or the files that it matches as a pattern, in the order of their names.

    Raises:
        ValueError: there is none, or one of a kind that is not read.
    """
    path = Path(name).expanduser() if root is None else Path(root).expanduser() / name
    files = [path] if path.is_file() else [Path(p) for p in sorted(glob.glob(str(path))) if Path(p).is_file()]
    if not files and path.is_dir():
        raise ValueError(
            f"{option}={name!r} is a folder: name a file in it, or several as {name.rstrip('/')}/*.parquet"
        )
    if not files:
        near = "" if not path.parent.is_dir() else nearest(path.name, [p.name for p in path.parent.iterdir()])
        raise ValueError(f"{option}={name!r}: no such file{'' if root is None else f' in {root!r}'}{near}")
    for file in files:
        if _kind(file) not in (*_SEPARATORS, ".parquet"):
            raise ValueError(
                f"{option}={file.name!r} is no .parquet, .csv or .tsv (the last two also {', '.join(_COMPRESSED)})"
            )
    return files


def source_of(
    root: str | None, named: Mapping[str, str | None], config: TableConfig, kept: Collection[str]
) -> tuple[dict[str, Any], Callable[[], RawTables]]:
    """Return plain values that distinguish a table of files from others, and a function that reads it.

    Args:
        root: folder from which the names start.
        named: the training, the validation and the test file by option, where given.
        config: description of the table.
        kept: ``predict_columns``, which are read as they are in the files.

    Raises:
        ValueError: see ``find_files``, and for reading ``read_columns``.
    """
    files = {option: find_files(root, name, option) for option, name in named.items() if name is not None}
    roles = {**dict.fromkeys(kept, "predict_columns"), **config.roles}
    # With another role it is text, as in rows to predict.
    is_inferred = config.roles.get(config.time or "") in ("time", "timestamps") and config.time not in kept
    numbers, time = {*config.continuous} - {*kept}, config.time if is_inferred else None

    def read() -> RawTables:
        train, val, test = (read_files(files[o], roles, numbers, time) if o in files else None for o in named)
        assert train is not None
        return RawTables(train, val, test, config)

    return {option: identity(paths) for option, paths in files.items()}, read


def read_files(
    files: list[Path], roles: Mapping[str, str], numbers: Collection[str] = (), inferred: str | None = None
) -> pa.Table:
    """Return the rows of all files, one after the other; the other arguments are as in `read_columns`.

    Raises:
        ValueError: as for `read_columns`, or the files differ in their types.
    """
    return joined([read_columns(file, roles, numbers, inferred) for file in files], files)


def joined(tables: Sequence[pa.Table], files: Sequence[Path]) -> pa.Table:
    """Return the rows of the tables of some files, one after the other.

    Raises:
        ValueError: the tables differ in their types.
    """
    if len(tables) == 1:
        return tables[0]
    try:
        return pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException as error:
        raise ValueError(f"{files[0].name} and the files beside it differ in their types: {_line(error)}") from error


def read_columns(
    file: Path, roles: Mapping[str, str], numbers: Collection[str] = (), inferred: str | None = None
) -> pa.Table:
    """Return some columns of one file.

    In a CSV file an empty field is a missing value and everything else is taken literally; that "NA" is no number is
    the encoder's to know. A file that is not compressed and does not end in a line end is read with a warning: its last
    field may be cut. A column "age.years" or "age/years" of a file is "age_years" too.

    Args:
        file: a file of a kind that `find_files` returns.
        roles: role of each column to read; messages name it.
        numbers: columns of numbers. One with a field that is not a number is read as text, so that the encoder can say
            which field it is.
        inferred: column whose type follows from a CSV file's fields, such as times. All others are text.

    Raises:
        ValueError: a column is missing or doubled, text is not UTF-8, or the file cannot be read, was cut, or unpacks
            to far more than its size explains (see ``apps.base.inflate``).
    """
    names = check_columns(file, roles)
    with naming(file):
        own = list(dict.fromkeys(names.values()))
        if _kind(file) == ".parquet":
            with open_parquet(file) as parquet:
                table = parquet.read(columns=own)
        else:
            table = _read_csv(file, own, [names[c] for c in numbers], names.get(inferred or ""))
    return _called(table, names)


def iter_columns(
    file: Path, roles: Mapping[str, str], numbers: Collection[str] = (), num_rows: int = 1 << 16
) -> Iterator[pa.Table]:
    """Yield the columns of one file piece by piece, so that a long file is never in memory as a whole.

    Args:
        file, roles, numbers: see `read_columns`.
        num_rows: rows of a chunk of a Parquet file; chunks of text have about a megabyte.

    Raises:
        ValueError: as for `read_columns`.
    """
    names = check_columns(file, roles)
    with naming(file):
        own = list(dict.fromkeys(names.values()))
        if _kind(file) == ".parquet":
            with open_parquet(file) as parquet:
                for batch in parquet.iter_batches(num_rows, columns=own):
                    yield _called(pa.Table.from_batches([batch]), names)
        else:
            for batch in _iter_csv(file, own, [names[c] for c in numbers]):
                yield _called(pa.Table.from_batches([batch]), names)


def check_columns(file: Path, roles: Mapping[str, str]) -> dict[str, str]:
    """Return the file's own name of each column; no row is read.

    Raises:
        ValueError: the file lacks a column, or has it twice; or it cannot be read.
    """
    with naming(file):
        if _kind(file) == ".parquet":
            with pa.parquet.ParquetFile(file) as parquet:
                names = parquet.schema_arrow.names
        else:
            with opened(file) as source, pa.csv.open_csv(source, _SERIAL, parse_options=layout(file)) as reader:
                names = reader.schema.names
    hint = ""
    if len(names) == 1 and _kind(file) in _SEPARATORS:
        hint = f", whose one column is {names[0]!r}: is it separated by {_SEPARATORS[_kind(file)]!r}?"
    return names_of(roles, names, repr(str(file)), hint)


def _called(table: pa.Table, names: Mapping[str, str]) -> pa.Table:
    return table.select(list(names.values())).rename_columns(list(names))


@contextlib.contextmanager
def naming(file: Path) -> Iterator[None]:
    """Name the file in an error of reading it."""
    try:
        yield
    except UnicodeDecodeError:
        raise ValueError(f"{str(file)!r} cannot be read: the names of its columns are no UTF-8 text") from None
    except _UNREADABLE as error:
        raise ValueError(f"{str(file)!r} cannot be read: {_line(error)}") from error


def _read_csv(file: Path, names: list[str], numbers: Collection[str], inferred: str | None) -> pa.Table:
    parse = layout(file)
    types: dict[str, Any] = {c: _TEXT for c in names if c != inferred}
    try:
        table = _convert(file, parse, {**types, **{c: pa.float64() for c in numbers}}, names)
    except pa.ArrowInvalid as error:
        if "conversion error" not in str(error):
            raise
        # A field of a column of numbers is not a number: from text the encoder can say which one, and in which row.
        with _naming_bytes(file, parse, types):
            table = _convert(file, parse, types, names)
    _check_end(file)
    return table


def _iter_csv(file: Path, names: list[str], numbers: Collection[str]) -> Iterator[pa.RecordBatch]:
    parse = layout(file)
    text: dict[str, Any] = dict.fromkeys(names, _TEXT)
    _check_end(file)
    count = 0
    try:
        for batch in _stream(file, parse, {**text, **{c: pa.float64() for c in numbers}}, names):
            yield batch
            count += 1
    except pa.ArrowInvalid as error:
        if "conversion error" not in str(error):
            raise
        with _naming_bytes(file, parse, text):  # as text from there on, as in _read_csv: the chunks are the same
            yield from itertools.islice(_stream(file, parse, text, names), count, None)


def layout(file: Path) -> pa.csv.ParseOptions:
    """Return how a file of text is parsed."""
    return pa.csv.ParseOptions(delimiter=_SEPARATORS[_kind(file)], newlines_in_values=True)


def _check_end(file: Path) -> None:
    """Warn of a file that may be cut within its last row."""
    if file.suffix.lower() in _COMPRESSED or rank_zero_only.rank != 0:  # compressed text shows that it was cut
        return
    with open(file, "rb") as content:
        content.seek(max(0, file.stat().st_size - 2))
        if content.read().strip(b"\0")[-1:] not in (b"\n", b"\r"):  # UTF-16 has two bytes a character
            log.warning("%r does not end in a line end: its last row may be cut", str(file))


@contextlib.contextmanager
def _naming_bytes(file: Path, parse: pa.csv.ParseOptions, types: Mapping[str, Any]) -> Iterator[None]:
    """Name the first value that is not UTF-8 text, where reading the columns of ``types`` fails for one."""
    try:
        yield
    except pa.ArrowInvalid as error:
        if "invalid UTF8" not in str(error):
            raise
        raw = _convert(file, parse, dict.fromkeys(types, pa.binary()), list(types))
        for column in raw.column_names:
            row = first_failing(raw[column], pa.string())
            if row < len(raw):
                break
        odd = f"column {column!r} holds {raw[column][row].as_py()!r} in row {row}, which is no UTF-8 text"
        raise ValueError(f"{str(file)!r} cannot be read: {odd}") from error


def _options(types: dict[str, Any], columns: list[str]) -> pa.csv.ConvertOptions:
    return pa.csv.ConvertOptions(
        column_types=types, include_columns=columns, null_values=[""], strings_can_be_null=True, true_values=["true"],
        false_values=["false"],
    )  # fmt: skip


def _stream(
    file: Path, parse: pa.csv.ParseOptions, types: dict[str, Any], columns: list[str]
) -> Iterator[pa.RecordBatch]:
    with opened(file) as source:
        yield from pa.csv.open_csv(source, _SERIAL, parse_options=parse, convert_options=_options(types, columns))


def _convert(file: Path, parse: pa.csv.ParseOptions, types: dict[str, Any], columns: list[str]) -> pa.Table:
    options = _options(types, columns)
    try:
        with opened(file) as source:
            return pa.csv.read_csv(source, parse_options=parse, convert_options=options)
    except pa.ArrowInvalid as error:
        if "parse error" not in str(error):
            raise
        with opened(file) as source:
            return pa.csv.read_csv(source, _SERIAL, parse_options=parse, convert_options=options)


@contextlib.contextmanager
def opened(file: Path) -> Iterator[Any]:
    """Yield a file of text as pyarrow takes it: its path, or a stream of UTF-16 text or of a compressed file's."""
    codec = _COMPRESSED.get(file.suffix.lower())
    if codec is None:
        with open(file, "rb") as content:
            is_utf_16 = content.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
        yield pa.transcoding_input_stream(pa.OSFile(str(file)), "utf-16", "utf-8") if is_utf_16 else file
        return
    with (
        pa.OSFile(str(file)) as packed,
        pa.CompressedInputStream(packed, codec) as unpacked,
        io.BufferedReader(Inflated(unpacked, file.stat().st_size, file.name), 1 << 20) as limited,
    ):
        yield limited


def _kind(file: Path) -> str:
    suffixes = [s.lower() for s in file.suffixes]
    if len(suffixes) > 1 and suffixes[-1] in _COMPRESSED:
        return suffixes[-2]
    return suffixes[-1] if suffixes else ""


def _line(error: BaseException) -> str:
    text = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
    text = "".join(c if c.isprintable() else "?" for c in text)  # what a broken file holds is not for a terminal
    return text if len(text) <= 200 else text[:197] + "..."
