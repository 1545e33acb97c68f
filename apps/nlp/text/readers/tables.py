"""Rows of named columns: JSON lines, and tables of commas or tabs. Each row comes with the number of its line."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from apps.data.text_files import text_lines

Numbered = Iterator[tuple[int, dict[str, Any]]]


def json_lines(path: Path) -> Numbered:
    """Yield the object of each line that is not empty.

    Raises:
        ValueError: a file that cannot be read, or a line that is no JSON object.
    """
    for number, line in enumerate(text_lines(path), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: no JSON: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: a JSON {type(row).__name__}, and not an object of columns")
        yield number, row


def table_rows(path: Path) -> Numbered:
    """Yield the rows below the header of a table, by commas, or in a ``.tsv`` by tabs; quotes are as in RFC 4180.

    Raises:
        ValueError: a file that cannot be read, or a row of more or fewer columns than the header.
    """
    csv.field_size_limit(1 << 30)
    lines = (f"{line}\n" for line in text_lines(path))
    reader = csv.DictReader(lines, delimiter="\t" if ".tsv" in path.suffixes else ",")
    for row in reader:
        if None in row or None in row.values():
            raise ValueError(
                f"{path}, line {reader.line_num}: not the {len(reader.fieldnames or ())} columns of line 1"
            )
        yield reader.line_num, row
