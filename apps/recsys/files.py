"""A user's own table from CSV or Parquet files, as an arrow table of the columns that have a role."""

from __future__ import annotations

import contextlib
import glob
import io
import os
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
from lightning.pytorch.utilities import rank_zero_warn

from apps.inflate import FREE, MOST, Inflated
from apps.recsys import encode
from apps.recsys.schema import nearest

_SEPARATORS = {".csv": ",", ".tsv": "\t"}
_SERIAL = pa.csv.ReadOptions(use_threads=False)  # only then an error of the layout names the row
_COMPRESSED = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd", ".lz4": "lz4"}


def find_files(root: str | None, name: str, option: str) -> list[Path]:
    """The file ``name``, or the files that it matches as a pattern, in the order of their names.

    Raises:
        ValueError: there is none, or one of a kind that is not read.
    """
    path = Path(name).expanduser() if root is None else Path(root).expanduser() / name
    found = [path] if path.is_file() else [Path(p) for p in sorted(glob.glob(str(path))) if Path(p).is_file()]
    if not found:
        near = "" if not path.parent.is_dir() else nearest(path.name, [p.name for p in path.parent.iterdir()])
        raise ValueError(f"{option}={name!r}: no such file{'' if root is None else f' in {root!r}'}{near}")
    for file in found:
        if _kind(file) not in (*_SEPARATORS, ".parquet"):
            raise ValueError(
                f"{option}={file.name!r} is no .parquet, .csv or .tsv (the last two also {', '.join(_COMPRESSED)})"
            )
    return found


def read_files(
    files: list[Path], roles: Mapping[str, str], numbers: Collection[str] = (), inferred: str | None = None
) -> pa.Table:
    """The rows of all files, one after the other; the other arguments are those of `read_columns`.

    Raises:
        ValueError: as `read_columns`, or files that differ in their types.
    """
    tables = [read_columns(file, roles, numbers, inferred) for file in files]
    if len(tables) == 1:
        return tables[0]
    try:
        return pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException as error:
        raise ValueError(f"{files[0].name} and the files beside it differ in their types: {_line(error)}") from error


def read_columns(
    file: Path, roles: Mapping[str, str], numbers: Collection[str] = (), inferred: str | None = None
) -> pa.Table:
    """Columns of one file.

    In a CSV file an empty field is a missing value and everything else stands for itself, "NA" as well. One that is not
    compressed and does not end in a line end is read with a warning: its last field may be cut.

    Args:
        file: of a kind that `find_files` finds.
        roles: the columns to read, and what each is for.
        numbers: those of numbers; if a field is none the column is text, so that `encode` can say which.
        inferred: one whose type a CSV file's fields tell, such as times. All others are text.

    Raises:
        ValueError: a missing or doubled column, text that is no UTF-8, a file that cannot be read, as one that was
            cut, or one that unpacks to far more than its size explains (see ``apps.inflate``).
    """
    try:
        if _kind(file) == ".parquet":
            with pa.parquet.ParquetFile(file) as parquet:
                _check(parquet.schema_arrow.names, roles, file)
                _check_size(parquet.metadata, file)
                texts = [f.name for f in parquet.schema_arrow if f.name in roles and _is_text(f.type)]
            # Texts stay numbers of distinct ones: a page may repeat a long one a million times in a few bytes.
            return pa.parquet.read_table(file, columns=list(roles), partitioning=None, read_dictionary=texts)
        return _read_csv(file, roles, numbers, inferred)
    except (pa.ArrowException, OSError, EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"{str(file)!r} cannot be read: {_line(error)}") from error


def _read_csv(file: Path, roles: Mapping[str, str], numbers: Collection[str], inferred: str | None) -> pa.Table:
    parse = pa.csv.ParseOptions(delimiter=_SEPARATORS[_kind(file)], newlines_in_values=True)
    with _opened(file) as source, pa.csv.open_csv(source, _SERIAL, parse_options=parse) as reader:
        names = reader.schema.names
    _check(names, roles, file)
    text = pa.dictionary(pa.int32(), pa.string())
    types: dict[str, Any] = {c: text for c in roles if c != inferred}
    try:
        table = _convert(file, parse, {**types, **{c: pa.float64() for c in numbers}}, list(roles))
    except pa.ArrowInvalid as error:
        if "conversion error" not in str(error):
            raise
        # Some field of a column of numbers is none: as text, the encoder can say which one, and in which row.
        try:
            table = _convert(file, parse, types, list(roles))
        except pa.ArrowInvalid as error:
            if "invalid UTF8" not in str(error):
                raise
            raise ValueError(f"{str(file)!r} cannot be read: {_no_text(file, parse, types)}") from error
    if file.suffix.lower() not in _COMPRESSED and not _ends_in_a_line_end(file):
        rank_zero_warn(f"{str(file)!r} does not end in a line end: its last row may be cut")
    return table


def _no_text(file: Path, parse: pa.csv.ParseOptions, types: Mapping[str, Any]) -> str:
    """The first value of the first column of text that is no UTF-8."""
    raw = _convert(file, parse, dict.fromkeys(types, pa.binary()), list(types))
    for column in raw.column_names:
        row = encode.first_failing(raw[column], pa.string())
        if row < len(raw):
            break
    return f"column {column!r} holds {raw[column][row].as_py()!r} in row {row}, which is no UTF-8 text"


def _ends_in_a_line_end(file: Path) -> bool:
    with open(file, "rb") as content:
        content.seek(-1, os.SEEK_END)
        return content.read() in (b"\n", b"\r")


def _convert(file: Path, parse: pa.csv.ParseOptions, types: dict[str, Any], columns: list[str]) -> pa.Table:
    options = pa.csv.ConvertOptions(
        column_types=types, include_columns=columns, null_values=[""], strings_can_be_null=True, true_values=["true"],
        false_values=["false"],
    )  # fmt: skip
    try:
        with _opened(file) as source:
            return pa.csv.read_csv(source, parse_options=parse, convert_options=options)
    except pa.ArrowInvalid as error:
        if "parse error" not in str(error):
            raise
        with _opened(file) as source:
            return pa.csv.read_csv(source, _SERIAL, parse_options=parse, convert_options=options)


@contextlib.contextmanager
def _opened(file: Path) -> Iterator[Any]:
    """A file of text as pyarrow takes it: the path, or of a compressed one a stream of text that has a limit."""
    codec = _COMPRESSED.get(file.suffix.lower())
    if codec is None:
        yield file
        return
    with (
        pa.OSFile(str(file)) as packed,
        pa.CompressedInputStream(packed, codec) as unpacked,
        io.BufferedReader(Inflated(unpacked, file.stat().st_size, file.name), 1 << 20) as limited,
    ):
        yield limited


def _check_size(metadata: pa.parquet.FileMetaData, file: Path) -> None:
    """Refuse a Parquet file that says that its pages or rows take far more memory than its size explains."""
    size = file.stat().st_size
    pages = sum(metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups))
    for what, count, found in (
        ("bytes of pages", pages, pages),
        ("rows", metadata.num_rows, 4 * metadata.num_rows * metadata.num_columns),  # a number of 32 bits at least
    ):
        if found > max(FREE, MOST * size):
            raise ValueError(
                f"{file.name} holds {count:,} {what} in {size:,} bytes: no data shrinks so much, and at most {MOST} "
                "times is read"
            )


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _check(names: list[str], roles: Mapping[str, str], file: Path) -> None:
    for column, role in roles.items():
        if column not in names:
            near = nearest(column, names)
            if len(names) == 1 and _kind(file) in _SEPARATORS:
                near = f", whose one column is {names[0]!r}: is it separated by {_SEPARATORS[_kind(file)]!r}?"
            raise ValueError(f"column {column!r} ({role}) is not in {str(file)!r}{near}")
        if names.count(column) > 1:
            raise ValueError(f"{str(file)!r} has two columns {column!r}")


def _kind(file: Path) -> str:
    suffixes = [s.lower() for s in file.suffixes]
    if len(suffixes) > 1 and suffixes[-1] in _COMPRESSED:
        return suffixes[-2]
    return suffixes[-1] if suffixes else ""


def _line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
