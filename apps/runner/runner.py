"""Units of work in order: each is done once, shown while it is done, and stopped when the time is up."""

from __future__ import annotations

import functools
import gc
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

from apps.base.progress import Bar, say
from apps.runner.budget import Budget
from apps.runner.workers import Progress, do_all

U = TypeVar("U", bound=Hashable)
R = TypeVar("R")


class Runner(ABC, Generic[U, R]):
    """Does units of work that are not finished.

    A subclass says how a unit is done and what is said of it; a unit that is no ``Unit`` needs the other methods too.

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
        """Do a unit, keep its result and return it; None where it cannot be done yet."""

    @abstractmethod
    def line(self, unit: U, result: R) -> str:
        """Return what is said of a unit that has just been finished; "" for nothing."""

    def read(self, unit: Any) -> R | None:
        """Return the result of a unit that is finished; None where it is not."""
        return cast("R | None", unit.read(self.output))

    def title(self, unit: Any) -> str:
        """Return what the bar and the line of a unit call it."""
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
