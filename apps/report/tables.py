"""Tables of results: on the screen, and as CSV files."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from apps.base.files import replacing

_NOT_SHARES = (
    *("loss", "ece", "error", "mse", "rmse", "mae", "r2", "spearman", "pcc", "score"),
    *("perplexity", "bits", "bleu", "chrf", "rank"),
)
"""Words in the names of metrics that are never shown in percent: a poor BLEU lies in 0..1 as well."""


def is_share(metric: str, values: Iterable[Iterable[float]]) -> bool:
    """Return whether a metric is shown in percent: a share in 0..1 that is no loss and no error.

    Args:
        metric: its name, such as "test/top1".
        values: its values, by system.
    """
    if any(word in _NOT_SHARES for word in metric.rpartition("/")[2].split("_")):
        return False
    return all(0 <= v <= 1 or math.isnan(v) for of_system in values for v in of_system)


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Write ``rows`` under all their keys, whole or not at all."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    with replacing(path, newline="") as file:
        writer = csv.DictWriter(file, keys)
        writer.writeheader()
        writer.writerows(rows)
    return path


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
