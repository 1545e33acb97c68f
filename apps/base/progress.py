"""Bars on the terminal for long work: the share that is done, figures of the work, and the time at which it ends.

Whoever has long work opens a ``bar``. Where one is on the terminal already, the new one is a row below it, so that a
bar over the whole stays in sight. Nothing is shown if stdout is not a terminal, or on the other ranks of a training.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sized
from contextvars import ContextVar
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

T = TypeVar("T")


def end_time(first: tuple[float, float], now: tuple[float, float], last: float) -> str:
    """Return the time of day at which work ends at its mean speed until now, such as 14:05; "" if not known yet.

    Args:
        first: time in seconds and work done at the start.
        now: the same now.
        last: what will be done at the end.
    """
    done, left = now[1] - first[1], last - now[1]
    if done <= 0 or left <= 0 or left == float("inf"):
        return ""
    end = time.localtime(now[0] + (now[0] - first[0]) / done * left)
    days = end.tm_yday - time.localtime(now[0]).tm_yday
    return time.strftime("%H:%M" if days == 0 else "%H:%M on %d %B", end)


class Bar:
    """One row on the terminal: a task, its progress, and when it ends.

    Attributes:
        name: name of the work.
        total: the amount of the work, in any unit; None: it is not known, and so is its end.
        figures: values of the work that are shown next to it, by name.
    """

    def __init__(
        self, rows: Progress, name: str, total: float | None, outer: Bar | None = None, weight: float = 0.0
    ) -> None:
        self.name, self.total = name, total
        self.figures: Mapping[str, float] = {}
        self._rows, self._outer, self._weight = rows, outer, weight
        self._done, self._first = 0.0, (time.time(), 0.0)
        self._at_work: list[Bar] = []
        self._weight_of_next = 0.0
        if outer is not None and weight:
            outer._at_work.append(self)
        self._row = rows.add_task(name, total=total, bar=self)

    @property
    def done(self) -> float:
        """Return how much is done, with the shares of the parts that are at work."""
        return self._done + sum(part._weight * part.share for part in self._at_work)

    @property
    def share(self) -> float:
        """Return the share that is done, from 0 to 1; 0 where the total is not known."""
        return min(1.0, self.done / self.total) if self.total else 0.0

    @property
    def is_drawn(self) -> bool:
        """Return whether there is a terminal that shows it."""
        return not self._rows.disable

    @property
    def ends(self) -> str:
        """Return the time of day at which the work ends; "" if not known yet."""
        return "" if self.total is None else end_time(self._first, (time.time(), self.done), self.total)

    def show(self, done: float, total: float | None = None, figures: Mapping[str, float] | None = None) -> None:
        """Show that so much is done; ``total`` and ``figures`` stay as they are if they are None."""
        self._done = done
        self.total = self.total if total is None else total
        self.figures = self.figures if figures is None else figures
        self._draw()

    def advance(self, by: float = 1.0) -> None:
        """Show that so much more is done."""
        self.show(self._done + by)

    def begin(self, total: float) -> None:
        """Set the amount of work, if it starts only now."""
        self._first = (time.time(), 0.0)
        self.show(0.0, total)

    def grow(self, more: float) -> None:
        """Say that there is so much more work."""
        self.show(self._done, (self.total or 0.0) + more)

    def skip(self, done: float) -> None:
        """Count work that an earlier run has done, which says nothing of the speed."""
        self._first = (self._first[0], self._first[1] + done)
        self.advance(done)

    def part(self, name: str, total: float | None = None, weight: float = 0.0) -> Bar:
        """Return a row for a part of this work, to be ended by ``finish``; this row moves with it by ``weight``."""
        return Bar(self._rows, name, total, self, weight)

    @contextlib.contextmanager
    def weighing(self, weight: float) -> Iterator[None]:
        """Count the block as so much of this work; the first ``bar`` that is opened in it moves this row."""
        end = self._done + weight
        self._weight_of_next = weight
        try:
            yield
        finally:
            self._weight_of_next = 0.0
            self.show(end)

    def finish(self) -> None:
        """Take the row off the terminal, and count it as done if the row above moves with it."""
        self._rows.remove_task(self._row)
        if self._outer is not None and self in self._outer._at_work:
            self._outer._at_work.remove(self)
            self._outer.advance(self._weight)

    def _draw(self) -> None:
        self._rows.update(self._row, completed=self.done, total=self.total)
        if self._outer is not None and self._weight:
            self._outer._draw()

    def _inside(self, name: str, total: float | None) -> Bar:
        weight, self._weight_of_next = self._weight_of_next, 0.0
        return self.part(name, total, weight)


# A process has one terminal, and two bars that know nothing of each other would draw over one another.
_SHOWN: ContextVar[Bar | None] = ContextVar("bar", default=None)


@contextlib.contextmanager
def bar(name: str, total: float | None = None, console: Console | None = None) -> Iterator[Bar]:
    """Show a bar while the block runs, below the existing ones.

    Args:
        name: name of the work.
        total: its amount, in any unit; None: it is not known.
        console: target of the first bar; None: stdout.
    """
    outer = _SHOWN.get()
    with contextlib.ExitStack() as stack:
        if outer is None:
            rows = _rows(console)
            if not rows.disable:
                stack.enter_context(rows)
            own = Bar(rows, name, total)
        else:
            own = outer._inside(name, total)
        _SHOWN.set(own)
        try:
            yield own
        finally:
            _SHOWN.set(outer)
            own.finish()


def each(items: Iterable[T], name: str, total: float | None = None) -> Iterator[T]:
    """Yield items one by one, with a bar that counts them; ``total`` is their number, if ``len`` does not tell."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    with bar(name, total) as own:
        for item in items:
            yield item
            own.advance()


def say(line: str) -> None:
    """Print a line, above the bars if there are any."""
    shown = _SHOWN.get()
    if shown is None or not shown.is_drawn:
        print(line, flush=True)
    else:
        shown._rows.console.print(line, highlight=False, markup=False, soft_wrap=True)


@contextlib.contextmanager
def set_aside() -> Iterator[None]:
    """Take the bars off the terminal while the block prints more than lines."""
    shown = _SHOWN.get()
    if shown is None or not shown.is_drawn:
        yield
        return
    shown._rows.stop()
    try:
        yield
    finally:
        shown._rows.start()


@contextlib.contextmanager
def hidden() -> Iterator[None]:
    """Show no bar while the block runs, as in a worker process, whose terminal another process uses."""
    outer = _SHOWN.get()
    _SHOWN.set(Bar(_rows(None, hides=True), "", None))
    try:
        yield
    finally:
        _SHOWN.set(outer)


def _rows(console: Console | None, hides: bool = False) -> Progress:
    """Return the rows of a terminal, without any yet; only the first process shows them, and only on a terminal."""
    from apps.base.rows import rows

    return rows(console, hides or not is_first_process())


def is_first_process() -> bool:
    """Return whether this is the first, or only, process of a run."""
    ranks = (os.environ.get(name, "0") for name in ("RANK", "LOCAL_RANK", "SLURM_PROCID"))
    return all(rank == "0" for rank in ranks)
