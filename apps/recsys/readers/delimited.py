"""Readers of delimited text as Arrow tables. A file that cannot be read ends in one ValueError that names it."""

from __future__ import annotations

import contextlib
import gzip
import io
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from apps.base.inflate import Inflated, naming_errors
from apps.base.messages import one_line


def first_file(root: Path, *names: str) -> Path:
    """Return the path of the first of ``names`` that ``root`` holds.

    Raises:
        ValueError: it holds none of them.
    """
    for name in names:
        if (root / name).is_file():
            return root / name
    raise ValueError(f"{root} holds no {' and no '.join(names)}")


def read_delimited(
    path: Path,
    types: Mapping[str, pa.DataType],
    *,
    columns: Sequence[str] | None = None,
    separator: str = ",",
    encoding: str = "utf8",
    num_rows: int | None = None,
    skip: str | None = None,
    quoted: bool = False,
) -> pa.Table:
    """Return some columns of a text file with one row a line.

    Args:
        path: path of the file, gzipped if its name ends in ``.gz``.
        types: types of the columns to read, in the order of the result. Spaces around a text are cut off.
        columns: the names of all columns where the file has no header; else its first line names them, and may add a
            type to each, as in ``user_id:token``.
        separator: text between the values of a line; more than one character is allowed.
        encoding: "utf8" or "latin1".
        num_rows: number of rows that the file must have, where known.
        skip: beginning of a first line that is not a row.
        quoted: whether values may be in double quotes, and an empty text is missing as an empty number is; else a quote
            is a character like another.

    Raises:
        ValueError: the file is missing, is truncated, not of that layout, or unpacks to far more than its size explains
            (see ``apps.base.inflate``).
    """
    first = _first_line(path, encoding)
    skipped = int(skip is not None and first.startswith(skip))
    empty = f"{path} is empty"
    if columns is None:
        columns = [name.strip().partition(":")[0] for name in first.split(separator)]
        skipped, empty = 1, f"{path} is empty below its header"
        if lacking := [name for name in types if name not in columns]:
            raise ValueError(f"{path} has no column {lacking[0]!r}; its header is {first[:80]!r}")
    try:
        with naming_errors(path, _HINT), _source(path, separator) as source:
            table = pa.csv.read_csv(
                source,
                read_options=pa.csv.ReadOptions(
                    column_names=columns, encoding=encoding, block_size=16 << 20, skip_rows=skipped
                ),
                parse_options=pa.csv.ParseOptions(
                    delimiter=_one(separator)[1].decode(), quote_char='"' if quoted else False, ignore_empty_lines=True
                ),
                convert_options=pa.csv.ConvertOptions(
                    column_types=dict(types), include_columns=list(types), null_values=[""], strings_can_be_null=quoted
                ),
            )
    except (pa.ArrowInvalid, pa.ArrowKeyError, UnicodeDecodeError) as error:
        if "Empty CSV file" in str(error):
            raise ValueError(empty) from error
        raise ValueError(f"{path} is corrupt: {_shortened(error)}{_HINT}") from error
    if not table.num_rows:
        raise ValueError(empty)
    for i, name in enumerate(table.column_names):
        if pa.types.is_string(table.schema.field(i).type):
            table = table.set_column(i, name, pc.utf8_trim_whitespace(table.column(i)))
    check_rows(path, table.num_rows, num_rows)
    return table


def check_rows(path: Path, num_rows: int, expected: int | None) -> None:
    """Raise ValueError if a file does not have the ``expected`` number of rows (None: unknown)."""
    if expected is not None and num_rows != expected:
        state = "is truncated" if num_rows < expected else "is not the original"
        raise ValueError(f"{path} {state}: {num_rows:,} rows, not {expected:,}{_HINT}")


def check_values(path: Path, column: pa.ChunkedArray, name: str, allowed: Collection[str]) -> None:
    """Raise ValueError if a text column holds anything but ``allowed``."""
    if odd := sorted(set(pc.unique(column).to_pylist()) - set(allowed), key=str):
        valid = ", ".join(map(repr, allowed))
        raise ValueError(f"{path} is corrupt: column {name!r} holds {odd[0]!r}, which is none of {valid}{_HINT}")


def look_up(table: pa.Table, key: str, wanted: pa.ChunkedArray) -> pa.Table:
    """Return for each of ``wanted`` the row of ``table`` with that ``key``, or a row of nulls if there is none."""
    return table.take(pc.index_in(wanted, value_set=table[key].combine_chunks()))


def side_by_side(*tables: pa.Table) -> pa.Table:
    """Join the columns of tables of the same number of rows."""
    return pa.table({name: table[name] for table in tables for name in table.column_names})


_HINT = "; if it was fetched for you, delete it to have it fetched again"


def _shortened(error: Exception) -> str:
    line = one_line(str(error))
    return line if len(line) <= 160 else line[:157] + "..."


def _one(separator: str) -> tuple[bytes, bytes]:
    """Return a separator, and the single character that replaces it."""
    return separator.encode(), separator.encode() if len(separator) == 1 else b"\x1f"


def _first_line(path: Path, encoding: str) -> str:
    with naming_errors(path, _HINT), _open(path) as file:
        line = file.readline()
    if not line:
        raise ValueError(f"{path} is empty")
    return line.decode(encoding, "replace").rstrip("\r\n").removeprefix("\ufeff")


def _open(path: Path) -> BinaryIO:
    """Open a file's bytes; a gzipped file is unpacked as a stream that has a limit."""
    if path.suffix != ".gz":
        return open(path, "rb")
    return io.BufferedReader(Inflated(gzip.open(path, "rb"), path.stat().st_size, path.name), 1 << 20)  # type: ignore[arg-type]


@contextlib.contextmanager
def _source(path: Path, separator: str) -> Iterator[Any]:
    """Open a file for pyarrow, which takes only separators of one character.

    A file with such a separator is streamed, so that it is not in memory together with the table.
    """
    with _open(path) as file:
        yield pa.BufferReader(file.read().replace(*_one(separator))) if len(separator) > 1 else file
