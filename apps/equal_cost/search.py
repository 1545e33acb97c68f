"""The search of the settings of a baseline that has no learning rate."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping


class Search:
    """The settings that a baseline tries, and the time for them.

    A setting is begun while there is time left, and then finished. What was tried is kept by its name, so that a search
    that was broken off goes on with the next one, and the seconds of all count.

    Args:
        minutes: for all settings of all tasks.
        tried: what an earlier part of the search has found, by the setting's name; see ``tried`` below.
        keep: told ``tried`` after each setting.

    Attributes:
        tried: by the setting's name, its ``quality`` on the validation split and the ``seconds`` that it took.
        total: settings that the whole search has; who searches counts them up.
    """

    def __init__(
        self,
        minutes: float = math.inf,
        tried: Mapping[str, Mapping[str, float]] | None = None,
        keep: Callable[[dict[str, dict[str, float]]], None] = lambda tried: None,
    ) -> None:
        self.minutes, self.keep, self.total = minutes, keep, 0
        self.tried = {name: dict(found) for name, found in (tried or {}).items()}

    @property
    def seconds(self) -> float:
        return sum(found["seconds"] for found in self.tried.values())

    def quality(self, name: str, run: Callable[[], float], until: float = math.inf) -> float | None:
        """Return what ``run()`` finds for the setting of this name, or has found before; None where time is up.

        Args:
            name: of the setting.
            run: tries it.
            until: share of the minutes that may have passed before it is begun.
        """
        if name not in self.tried:
            if self.seconds >= 60 * self.minutes * until:
                return None
            began = time.perf_counter()
            quality = run()
            self.tried[name] = {"quality": quality, "seconds": time.perf_counter() - began}
            self.keep(self.tried)
        return self.tried[name]["quality"]
