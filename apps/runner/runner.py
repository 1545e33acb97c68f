"""Units of work in order: each is done once, shown while it is done, and stopped when the time is up."""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

from apps import registry
from apps.base.files import holding, read_json, write_json
from apps.base.progress import Bar, bar, say
from apps.runner.workers import Progress, do_all


@contextlib.contextmanager
def at_work(folder: Path, what: str, title: str = "") -> Iterator[Bar]:
    """Make and hold the folder of a comparison, a suite or a verdict inside, and yield the bar over all of its work.

    Raises:
        ValueError: another process holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with holding(folder / ".lock", f"another {what} is at work in {folder}"), bar(title or what) as whole:
        yield whole


def check_same(folder: Path, what: str, saved: Any, wanted: Any) -> None:
    """Reject a folder whose work was begun with other options.

    Args:
        folder: the folder.
        what: what is in it, such as "comparison".
        saved: plain values that its work was begun with.
        wanted: the current ones.

    Raises:
        ValueError: they differ; the message names the first three differences.
    """
    lines = differences(saved, wanted)
    if lines:
        more = f" and {len(lines) - 3} more" if len(lines) > 3 else ""
        raise ValueError(
            f"{folder} holds another {what} ({'; '.join(lines[:3])}{more}): give another --output, or delete it"
        )


def differences(saved: Any, wanted: Any) -> list[str]:
    """Return a line for each value that differs between two plain values, by its dotted name.

    Example::

        differences({"lr": 1, "seeds": 3}, {"lr": 1, "seeds": 5})     # ["seeds: 3 saved, 5 now"]
    """
    found = registry.differences(saved, wanted)
    return [f"{name}: {json.dumps(there)} saved, {json.dumps(here)} now" for name, there, here in found]


MOST_HELD_BACK = 0.1
"""Part of the seconds that the reserve may be raised to on a slow machine."""

_KEPT_EVERY = 5.0


class BudgetOver(Exception):
    """The time is up: finished work stays, and running work is given up or continues another time."""


class Budget:
    """Counts the seconds of a piece of work.

    A killed process has written the seconds it has spent, except at most the last five, and its successor resumes from
    there.

    Args:
        seconds: all that may be spent.
        path: file that keeps the seconds spent; None: each process has all of the seconds.
        clock: a function that returns the time in seconds.
        began: the clock's time when this process began; None: now.
        reserve: seconds that are kept for the end.

    Attributes:
        kept: seconds as they were written last.
    """

    def __init__(
        self,
        seconds: float = math.inf,
        path: Path | None = None,
        clock: Callable[[], float] = time.monotonic,
        began: float | None = None,
        reserve: float = 0.0,
    ) -> None:
        self.seconds, self.path, self.clock, self.reserve = seconds, path, clock, reserve
        self._began = clock() if began is None else began
        saved = None if path is None else read_json(path)
        self._earlier = self.kept = 0.0 if saved is None else float(saved["seconds"])

    def hold_back(self, seconds: float) -> None:
        """Raise the reserve to ``seconds``, within ``MOST_HELD_BACK``."""
        self.reserve = max(self.reserve, min(seconds, MOST_HELD_BACK * self.seconds))

    @property
    def spent(self) -> float:
        return self._earlier + self.clock() - self._began

    @property
    def left(self) -> float:
        """Return the seconds for units, without the reserve; not above 0 if they are over."""
        return self.seconds - self.reserve - self.spent

    def keep(self) -> None:
        """Write the seconds spent."""
        if self.path is not None:
            self.kept = self.spent
            write_json(self.path, {"seconds": self.kept})

    def check(self) -> None:
        """Write the seconds spent now and then, and end running work when the time is up.

        Raises:
            BudgetOver: no time is left but the reserve.
        """
        if self.spent - self.kept > _KEPT_EVERY:
            self.keep()
        if self.left <= 0:
            raise BudgetOver


U = TypeVar("U", bound=Hashable)
R = TypeVar("R")


class Runner(ABC, Generic[U, R]):
    """Does units of work that are not finished.

    A subclass says how a unit is done and reported; a unit that is no ``Unit`` needs the other methods too.

    Args:
        whole: the bar over all of the work.
        output: folder of the work.
        budget: the time for it; None: no limit.

    Attributes:
        num_done: number of units that were not finished before.
    """

    def __init__(self, whole: Bar, output: Path, budget: Budget | None = None) -> None:
        self.whole, self.output, self.budget, self.num_done = whole, output, budget or Budget(), 0
        self._rows: dict[str, Bar] = {}

    @abstractmethod
    def work(self, unit: U, progress: Progress) -> R | None:
        """Do a unit, keep its result and return it; None if it cannot be done yet."""

    @abstractmethod
    def line(self, unit: U, result: R) -> str:
        """Return the report of a unit that has just finished; "" for nothing."""

    def read(self, unit: Any) -> R | None:
        """Return the result of a unit that is finished; None if it is not."""
        return cast("R | None", unit.read(self.output))

    def title(self, unit: Any) -> str:
        """Return the name of a unit in the bar and its line."""
        return str(unit.title)

    def weight(self, unit: Any) -> float:
        """Return how much of the whole work a unit is."""
        return float(unit.weight)

    def finish(
        self,
        units: Iterable[U],
        jobs: int = 1,
        make: Callable[[], Callable[[Any, Progress], Any]] | None = None,
        modules: Sequence[str] = (),
    ) -> dict[U, R]:
        """Do the units that are not finished, and return the results of all.

        Args:
            units: units in the order in which they are begun; one that is there twice is done once.
            jobs: number of units at a time; above 1 each has a process of its own, with a part of the threads.
            make, modules: see ``do_all``; they are for several at a time.

        Raises:
            BudgetOver: the time is up.
        """
        results = {unit: self.read(unit) for unit in units}
        left = [unit for unit, result in results.items() if result is None]
        self.whole.skip(sum(self.weight(unit) for unit, result in results.items() if result is not None))

        def finished(unit: U, result: R | None) -> None:
            results[unit] = result
            if result is not None:
                self.num_done += 1
                self.end(self.title(unit), self.weight(unit))
                if line := self.line(unit, result):
                    say(f"{self.title(unit)}: {line}")

        def progress(unit: U, done: int, total: int, figures: Mapping[str, float]) -> None:
            self.show(self.title(unit), done, total, figures, self.weight(unit))

        if jobs > 1 and len(left) > 1 and make is not None:
            do_all(make, left, jobs, modules, progress, finished)
        else:
            for unit in left:
                self.budget.check()
                try:
                    result = self.work(unit, functools.partial(progress, unit))
                finally:
                    self.budget.keep()
                    gc.collect()
                finished(unit, result)
        return {unit: result for unit, result in results.items() if result is not None}

    def show(
        self, title: str, done: int, total: int, figures: Mapping[str, float] | None = None, weight: float = 1.0
    ) -> None:
        """Show the progress of a part, which is so much of the whole work."""
        if title not in self._rows:
            self._rows[title] = self.whole.part(title, weight=weight)
        self._rows[title].show(done, total or None, figures)

    def end(self, title: str, weight: float = 1.0) -> None:
        """Count a part as done."""
        if title in self._rows:
            self._rows.pop(title).finish()
        else:
            self.whole.advance(weight)
