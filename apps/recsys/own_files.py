"""The files of a table that a user names, read to be looked at, and the columns that the user names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.csv

from apps.base.messages import excerpt
from apps.data.parquet_files import read_parquet
from apps.recsys.encoding.numbers import is_text, known_text
from apps.recsys.readers.user_tables import find_files, layout, naming, opened
from apps.recsys.schema import nearest

_ENDINGS = (".csv", ".tsv", ".parquet")
_LARGEST_BLOCK = 1 << 28


def check_columns(asked: Sequence[tuple[str, str | None]], table: pa.Table, file: Path, name: str) -> None:
    """Reject options that name no column of a table, or its target twice.

    Args:
        asked: options with their columns; the first one is a target.
        table: the table.
        file: its first file.
        name: what to call the table.
    """
    names = table.column_names
    for option, column in asked:
        if column is None or column in names:
            continue
        near = nearest(column, names)
        if len(names) == 1 and file.suffix.lower() != ".parquet":
            near = f", whose one column is {excerpt(names[0])}: is it separated by commas, or .tsv by tabs?"
        raise ValueError(f"--{option} {column!r} is not a column of {name}{near}")
    targets = [column for option, column in asked if option == "target"]
    if doubled := next((own for own in asked if own[0] != "target" and own[1] in targets), None):
        raise ValueError(f"--{doubled[0]} {doubled[1]!r} is the target")


def table_files(path: Path) -> list[Path]:
    """Return the files of a table; none if there is none."""
    if path.is_dir():
        parts = {ending: sorted(path.glob(f"*{ending}")) for ending in _ENDINGS}
        kinds = [ending for ending, own in parts.items() if own]
        if len(kinds) > 1:
            raise ValueError(f"{path} holds tables of several kinds ({', '.join(kinds)}): name one file")
        return parts[kinds[0]] if kinds else []
    return find_files(None, str(path), "DATA") if any(s.lower() in _ENDINGS for s in path.suffixes) else []


def read_tables(files: Sequence[Path]) -> dict[Path, pa.Table]:
    """Return the table of each file, as `TableData` reads it: "NA" is missing among numbers, and text elsewhere.

    Raises:
        ValueError: a file cannot be read, or has a column twice.
    """
    tables = {}
    for file in files:
        with naming(file):
            tables[file] = _read_file(file)
            column, count = max(Counter(tables[file].column_names).items(), key=lambda own: own[1], default=("", 0))
        if count > 1:
            raise ValueError(f"column {column!r} is twice in {str(file)!r}")
    return tables


def _read_file(file: Path) -> pa.Table:
    if file.suffix.lower() == ".parquet":
        return read_parquet(file)
    convert = pa.csv.ConvertOptions(null_values=[""], strings_can_be_null=True)
    # The types follow from the first block: a larger one has the "unknown" that comes late in a column of
    # numbers. A compressed file unpacks to a few times its size.
    block = pa.csv.ReadOptions(block_size=min(max(20 * file.stat().st_size, 1 << 20), _LARGEST_BLOCK))
    with opened(file) as source:
        table = pa.csv.read_csv(source, block, layout(file), convert)
    columns = [_numbers_in(own) if is_text(own.type) else own for own in table.columns]
    return pa.Table.from_arrays(columns, table.column_names)


def _numbers_in(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return text as numbers if all of it is, but for "NA" and the like, and as it is otherwise."""
    try:
        return known_text(column).cast(pa.float64())
    except pa.ArrowInvalid:
        return column
