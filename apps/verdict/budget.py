"""The seconds that a verdict may take, over all processes that work on it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from apps.compare.files import read_json, write_json

RESERVE_SHARE, LEAST_RESERVE, MOST_RESERVE = 0.03, 1.0, 20.0
"""Part of the seconds that is kept for the end, when the result is written, with its limits in seconds."""

MOST_HELD_BACK = 0.1
"""Part of the seconds that the reserve may be raised to on a slow machine."""

_KEPT_EVERY = 5.0


class BudgetOver(Exception):
    """The time is up: what is unfinished is given up, and what is finished is judged."""


class Budget:
    """Counts the seconds of a verdict.

    A killed process has written what it has spent, to the last five seconds, and its successor goes on from there.

    Args:
        seconds: all that may be spent.
        path: file that keeps what is spent.
        clock: a function that returns the time in seconds.
        began: the clock's time when this process began; None: now.

    Attributes:
        reserve: seconds that are kept for the end.
        kept: seconds as they were written last.
    """

    def __init__(
        self, seconds: float, path: Path, clock: Callable[[], float] = time.monotonic, began: float | None = None
    ) -> None:
        self.seconds, self.path, self.clock = seconds, path, clock
        self._began = clock() if began is None else began
        self._earlier = float((read_json(path) or {"seconds": 0.0})["seconds"])
        self.kept = self._earlier
        self.reserve = min(max(RESERVE_SHARE * seconds, LEAST_RESERVE), MOST_RESERVE)

    def hold_back(self, seconds: float) -> None:
        """Raise the reserve to ``seconds``, within ``MOST_HELD_BACK``."""
        self.reserve = max(self.reserve, min(seconds, MOST_HELD_BACK * self.seconds))

    @property
    def spent(self) -> float:
        return self._earlier + self.clock() - self._began

    @property
    def left(self) -> float:
        """Return the seconds for runs, without the reserve; negative where they are over."""
        return self.seconds - self.reserve - self.spent

    def keep(self) -> None:
        """Write what is spent."""
        self.kept = self.spent
        write_json(self.path, {"seconds": self.kept})

    def check(self) -> None:
        """Write what is spent now and then, and end what is at work when the time is up.

        Raises:
            BudgetOver: no time is left but the reserve.
        """
        if self.spent - self.kept > _KEPT_EVERY:
            self.keep()
        if self.left <= 0:
            raise BudgetOver
