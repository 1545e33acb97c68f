"""The columns of the bars on a terminal, by rich; ``apps.base.progress`` fills them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskProgressColumn, TimeElapsedColumn
from rich.table import Column
from rich.text import Text

_NARROW = 100
"""Columns of a terminal below which a row has a short bar, and no time since its start, to stay on one line."""


class TextOf(ProgressColumn):
    """Shows a text of each row on one line.

    Args:
        text: returns the text of a row, given its ``Bar``.
        is_cut: the text is cut if the line is too long.
    """

    def __init__(self, text: Callable[[Any], str], is_cut: bool = False) -> None:
        super().__init__(Column(no_wrap=not is_cut))
        self._text = text

    def render(self, task: Task) -> Text:
        return Text(self._text(task.fields["bar"]), no_wrap=True, overflow="ellipsis")


def rows(console: Console | None, hides: bool) -> Progress:
    """Return rows of name, bar, percentage, figures, time since the start and time of the end.

    Args:
        console: their target; None: stdout.
        hides: show nothing, as if the console were not a terminal.
    """
    console = Console() if console is None else console
    is_narrow = console.width < _NARROW
    return Progress(
        TextOf(lambda bar: bar.name, is_cut=True),
        BarColumn(10 if is_narrow else 24),
        TaskProgressColumn(),
        TextOf(lambda bar: "  ".join(f"{name} {value:.3g}" for name, value in bar.figures.items())),
        *([] if is_narrow else [TimeElapsedColumn()]),
        TextOf(lambda bar: f"ends {bar.ends}" if bar.ends else ""),
        console=console,
        transient=True,
        # A stream other than a terminal keeps its output.
        redirect_stdout=sys.stdout.isatty(),
        redirect_stderr=sys.stderr.isatty(),
        refresh_per_second=4,
        disable=hides or not console.is_terminal,
    )
