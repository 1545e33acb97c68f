"""The progress bars and lines of a comparison at work."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

from apps.compare.systems import label
from apps.compare.training import Unit

if TYPE_CHECKING:
    from rich.progress import TaskID


def describe(unit: Unit) -> str:
    """Return a unit in words."""
    what = f"seed {unit.seed}" if unit.final else "search"
    rate = "" if unit.rate is None else f" at learning rate {unit.rate:g}"
    return f"[{label(unit.system)}] {what}{rate}"


class Display:
    """Shows a bar for the whole comparison and one for the unit at work; on a pipe, only a line a finished unit."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

        self.console = Console()
        self.bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self.total = self.bars.add_task("comparison", total=None)
        self.tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Display:
        self.bars.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.bars.stop()

    def start(self, units: int) -> None:
        self.bars.update(self.total, total=units)

    def advance(self, units: int) -> None:
        self.bars.advance(self.total, units)

    def unit(self, name: str, done: int, total: int) -> None:
        """Show the progress of a unit."""
        if name not in self.tasks:
            self.tasks[name] = self.bars.add_task(name, total=None)
        self.bars.update(self.tasks[name], completed=done, total=total or None)

    def finished(self, name: str) -> None:
        """Count a unit as done."""
        if name in self.tasks:
            self.bars.remove_task(self.tasks.pop(name))
        self.bars.advance(self.total)

    def say(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        task = self.bars.add_task(name, total=None)
        try:
            yield
        finally:
            self.bars.remove_task(task)
