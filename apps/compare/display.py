"""The progress bars and lines of a comparison at work, and of a verdict."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

from apps.base.progress import Bar, bar, say
from apps.compare.systems import label
from apps.compare.training import Unit


def describe(unit: Unit) -> str:
    """Return a unit in words."""
    what = f"seed {unit.seed}" if unit.final else "search"
    rate = "" if unit.rate is None else f" at learning rate {unit.rate:g}"
    return f"[{label(unit.system)}] {what}{rate}"


class Display:
    """Shows a bar for the whole and one for each run at work; on a pipe, only a line a finished run.

    Args:
        name: what the whole is.
    """

    def __init__(self, name: str) -> None:
        self._name, self._stack = name, contextlib.ExitStack()
        self._units: dict[str, Bar] = {}

    def __enter__(self) -> Display:
        self._whole = self._stack.enter_context(bar(self._name))
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def start(self, total: float) -> None:
        """Say how much work there is, in a unit of the caller's."""
        self._whole.begin(total)

    def grow(self, more: float) -> None:
        """Say that there is more work than was said at the start."""
        self._whole.grow(more)

    def skip(self, work: float) -> None:
        """Count work that an earlier process has done."""
        self._whole.skip(work)

    def unit(
        self, name: str, done: int, total: int, figures: Mapping[str, float] | None = None, work: float = 1.0
    ) -> None:
        """Show the progress of a unit, which is so much of the whole work, and the use of its experts."""
        if name not in self._units:
            self._units[name] = self._whole.part(name, weight=work)
        self._units[name].show(done, total or None, figures)

    def finished(self, name: str, work: float = 1.0) -> None:
        """Count a unit as done."""
        if name in self._units:
            self._units.pop(name).finish()
        else:
            self._whole.advance(work)

    def say(self, line: str) -> None:
        say(line)

    @contextlib.contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Show a step whose length is not known."""
        with bar(name):
            yield
