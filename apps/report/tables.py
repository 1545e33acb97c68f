"""Tables of results: on the screen, and as CSV files."""

from __future__ import annotations

import csv
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from apps.base.files import replacing

_NOT_SHARES = (
    *("loss", "ece", "error", "mse", "rmse", "mae", "r2", "spearman", "pcc", "score"),
    *("perplexity", "bits", "bleu", "chrf", "rank", "frechet", "ratio", "seconds", "mflops"),
)
"""Words in the names of metrics that are never shown in percent: a poor BLEU lies in 0..1 as well."""
_COMPUTED = re.compile(r"^[=@]|^[+-](?!(\d+\.?\d*|\.\d+)(e[+-]?\d+)?$)|[\x00-\x1f\x7f-\x9f]", re.IGNORECASE)


def is_share(metric: str, values: Iterable[Iterable[float]]) -> bool:
    """Return whether a metric is shown in percent: a share in 0..1 that is neither a loss nor an error.

    Args:
        metric: its name, such as "test/top1".
        values: its values, by system.
    """
    if any(word in _NOT_SHARES for word in metric.rpartition("/")[2].split("_")):
        return False
    return all(0 <= v <= 1 or math.isnan(v) for of_system in values for v in of_system)


def csv_cell(value: Any) -> Any:
    """Return a value of a CSV file, with an apostrophe before text that a spreadsheet would compute or that holds
    control characters. Numbers, also as text, stay as they are."""
    return f"'{value}" if isinstance(value, str) and _COMPUTED.search(value) else value


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write ``rows`` under all their keys, whole or not at all."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    with replacing(path, newline="") as file:
        writer = csv.DictWriter(file, keys)
        writer.writeheader()
        writer.writerows({key: csv_cell(value) for key, value in row.items()} for row in rows)
    return path


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a table in Markdown, whose first column is aligned on the left."""
    lines = [[cell.replace("|", "\\|") for cell in row] for row in (columns, *rows)]
    lines.insert(1, ["---", *["---:"] * (len(columns) - 1)])
    return [f"| {' | '.join(line)} |" for line in lines]


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a rich table on standard output."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=escape(title) or None, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(escape(column), justify="left" if not number else "right", no_wrap=not number)
    for row in rows:
        table.add_row(*map(escape, row))
    Console().print(table)


def print_in_parts(columns: Sequence[str], rows: Sequence[Sequence[str]], empty: str = "", title: str = "") -> None:
    """Print a table in parts that fit the terminal, one below the other; each starts with the first column.

    Args:
        columns: headings.
        rows: the cells.
        empty: text of an empty cell; a row of them is left out of its part.
        title: title above the first part.
    """
    from rich.console import Console

    for number, part in enumerate(parts_that_fit([columns, *rows], Console().width)):
        lines = [[row[index] for index in part] for row in rows]
        headings = [columns[index].replace(", ", ",\n") for index in part]
        shown = [line for line in lines if any(cell != empty for cell in line[1:])]
        print_table("" if number else title, headings, shown)


def parts_that_fit(rows: Sequence[Sequence[str]], width: int) -> list[list[int]]:
    """Return the columns of each of several tables that fit ``width`` characters; all start with the first column."""

    def needed(index: int) -> int:
        words = rows[0][index].replace(",", ", ").split()
        return 3 + max(map(len, [*words, *(row[index] for row in rows[1:])]), default=0)

    first = 4 + max(len(row[0]) for row in rows)
    parts: list[list[int]] = []
    room = 0
    for index in range(1, len(rows[0])):
        if not parts or needed(index) > room:
            parts.append([0])
            room = width - first
        parts[-1].append(index)
        room -= needed(index)
    return parts
