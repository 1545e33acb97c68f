"""The seconds that work may take, over all processes that do it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path

from apps.base.files import read_json, write_json

MOST_HELD_BACK = 0.1
"""Part of the seconds that the reserve may be raised to on a slow machine."""

_KEPT_EVERY = 5.0


class BudgetOver(Exception):
    """The time is up: what is finished stays, and what is at work is given up or goes on another time."""


class Budget:
    """Counts the seconds of a piece of work.

    A killed process has written what it has spent, to the last five seconds, and its successor goes on from there.

    Args:
        seconds: all that may be spent.
        path: file that keeps what is spent; None: each process has all of the seconds.
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
        """Return the seconds for units, without the reserve; not above 0 where they are over."""
        return self.seconds - self.reserve - self.spent

    def keep(self) -> None:
        """Write what is spent."""
        if self.path is not None:
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
