"""Tables of commas or tabs. Each row comes with the number of its line."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from apps.data.text_files import text_lines


def table_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
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
