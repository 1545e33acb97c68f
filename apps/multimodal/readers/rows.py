"""The rows of a table, whatever its kind, each with a name for messages."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from apps.base.messages import excerpt, some, unknown_name
from apps.data.documents import JSON_LINES, json_lines, parquet_rows
from apps.data.text_files import COMPRESSED, text_lines

SEPARATORS = {".csv": ",", ".tsv": "\t"}
ENDINGS = (*SEPARATORS, *JSON_LINES, ".parquet")
"""Endings of tables; those of text may be followed by one of ``COMPRESSED``."""


def kind_of(path: Path) -> str | None:
    """Return the ending of ``ENDINGS`` that says what a table is; None: it is none."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if len(suffixes) > 1 and suffixes[-1] in COMPRESSED and suffixes[-2] != ".parquet":
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in ENDINGS else None


def find_table(root: Path, name: str | None) -> Path:
    """Return the table of this name below ``root``, or the only one in ``root``.

    Raises:
        ValueError: there is none, there are several to choose from, or it has a format that is not read.
    """
    if name is not None:
        path = root / name
        if not path.is_file():
            raise ValueError(f"table={name!r}: no such file in {str(root)!r}")
        if kind_of(path) is None:
            raise ValueError(f"table={name!r} is no {', '.join(ENDINGS)} file")
        return path
    tables = tables_in(root)
    if len(tables) != 1:
        has = f"several tables ({some([path.name for path in tables])})" if tables else f"no {', '.join(ENDINGS)} file"
        raise ValueError(f"root={str(root)!r} holds {has}: name one by table (--data.table)")
    return tables[0]


def tables_in(folder: Path) -> list[Path]:
    """Return the tables that lie in a folder itself, sorted."""
    return sorted(path for path in folder.iterdir() if path.is_file() and kind_of(path) is not None)


def rows_of(
    path: Path, roles: Mapping[str, str], optional: Sequence[str] | None = ()
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each row's name, such as ``titles.csv, row 7``, and its values by column.

    Rows are counted from 1, without the header. In JSON lines a column that a line lacks is None there.

    Args:
        path: the table.
        roles: role of each column that is needed, for messages.
        optional: columns that may be missing; None: all columns that there are.

    Raises:
        ValueError: a column is missing or doubled, a row has too many or too few values, or the file cannot be read.
    """
    kind = kind_of(path)
    if kind == ".parquet":
        yield from _parquet(path, roles, optional)
    elif kind in JSON_LINES:
        yield from _json_lines(path, roles)
    else:
        yield from separated(path, roles, SEPARATORS[str(kind)])


def separated(path: Path, roles: Mapping[str, str], separator: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield the rows of a text file of separated values, whose first line names the columns; see ``rows_of``."""
    reader = csv.reader((f"{line}\n" for line in text_lines(path)), delimiter=separator, strict=True)
    number = 0
    try:
        header = [name.strip() for name in next(reader, [])]
        _check_columns(path, header, roles)
        for values in reader:
            if not values:  # an empty line
                continue
            number += 1
            row = f"{path}, row {number}"
            if len(values) != len(header):
                raise ValueError(f"{row} has {len(values)} values, and the header names {len(header)} columns")
            yield row, dict(zip(header, values, strict=True))
    except csv.Error as error:
        raise ValueError(f"{path}, row {number + 1} cannot be read: {error}; is a quote not closed?") from error


def _json_lines(path: Path, roles: Mapping[str, str]) -> Iterator[tuple[str, dict[str, Any]]]:
    names: set[str] = set()
    for row, (_, values) in enumerate(json_lines(path), 1):
        names.update(values)
        yield f"{path}, row {row}", {**dict.fromkeys(roles), **values}
    _check_columns(path, sorted(names), roles)


def _parquet(
    path: Path, roles: Mapping[str, str], optional: Sequence[str] | None
) -> Iterator[tuple[str, dict[str, Any]]]:
    def columns(has: list[str]) -> list[str]:
        _check_columns(path, has, roles)
        also = has if optional is None else [name for name in optional if name in has]
        return list(dict.fromkeys([*roles, *also]))

    yield from parquet_rows(path, columns)


def _check_columns(path: Path, names: Sequence[str], roles: Mapping[str, str]) -> None:
    for column, role in roles.items():
        if column not in names:
            raise ValueError(f"{path}: {unknown_name(role, column, list(names))}")
    twice = [name for name, count in Counter(names).items() if count > 1 and name in roles]
    if twice:
        raise ValueError(f"{path} has two columns {twice[0]!r}")


def as_text(value: Any, row: str, column: str) -> str:
    """Return a value as it is written; "" if there is none.

    Raises:
        ValueError: it is not text, number or truth value.
    """
    if value is None or value != value:  # a NaN
        return ""
    if not isinstance(value, (str, int, float)):
        raise ValueError(f"{row}: column {column!r} holds {excerpt(value)}, which is no text")
    return str(value)


def as_texts(value: Any, row: str, column: str) -> list[str]:
    """Return a value or the values of a list as they are written; see ``as_text``."""
    if isinstance(value, (list, tuple)):
        return [as_text(one, row, column) for one in value]
    return [as_text(value, row, column)]
