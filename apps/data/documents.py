"""Documents and rows of named values in files of text, JSON lines and Parquet."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from apps.base.messages import excerpt, one_line
from apps.data.parquet_files import parquet_tables
from apps.data.text_files import COMPRESSED, text_lines

JSON_LINES = (".jsonl", ".ndjson")


def holds_rows(path: Path) -> bool:
    """Return whether a file holds rows of named values by its name: Parquet, or JSON lines, also compressed."""
    plain = path.with_suffix("") if path.suffix in COMPRESSED else path
    return plain.suffix.lower() in JSON_LINES or path.suffix.lower() == ".parquet"


def rows_in(path: Path, names: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the rows of a Parquet file, or of JSON lines, each with where it is.

    Args:
        path: the file.
        names: of the values that are wanted; the others need not be read.

    Raises:
        ValueError: a file that cannot be read, or a line that is no JSON object.
    """
    if path.suffix.lower() == ".parquet":
        yield from parquet_rows(path, lambda has: [name for name in has if name in names])
    else:
        yield from ((f"{path}, line {number}", row) for number, row in json_lines(path))


def json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the object of each line that is not empty, with the line's number.

    Raises:
        ValueError: a file that cannot be read, or a line that is no JSON object.
    """
    for number, line in enumerate(text_lines(path), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number} is no JSON: {one_line(str(error))}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number} is {excerpt(row)}, not an object")
        yield number, row


def parquet_rows(path: Path, columns: Callable[[list[str]], Sequence[str]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the rows of a Parquet file, each with where it is.

    Args:
        path: the file.
        columns: returns the columns that are read, of all names.

    Raises:
        ValueError: the file cannot be read, or unpacks to far more than it holds.
    """
    import pyarrow as pa

    number = 0
    try:
        for table in parquet_tables(path, columns, 4096):
            for values in table.to_pylist():
                number += 1
                yield f"{path}, row {number}", values
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} cannot be read: {one_line(str(error))}") from error


def documents_in(path: Path, unit: str) -> Iterator[list[str]]:
    """Yield the lines of each document of a file, as they are.

    Args:
        path: JSON lines or Parquet, of which the ``text`` of each row is a document, or text.
        unit: of text: "line", "paragraph" (lines up to an empty one) or "file".

    Raises:
        ValueError: as ``text_lines`` and ``rows_in``; or a row without a text.
    """
    if holds_rows(path):
        for where, row in rows_in(path, ("text",)):
            if not isinstance(text := row.get("text"), str):
                raise ValueError(f'{where} has no "text"')
            yield text.split("\n")
        return
    part: list[str] = []
    for line in text_lines(path):
        line = line.removesuffix("\r")
        if unit == "file" or line.strip():
            part.append(line)
        if part and (unit == "line" or (unit == "paragraph" and not line.strip())):
            yield part
            part = []
    if any(map(str.strip, part)):
        yield part
