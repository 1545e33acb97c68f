"""The search of the settings of a baseline that has no learning rate."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping


class Search:
    """The settings that a baseline tries, and the time for them.

    A setting is begun while there is time left, and then finished. Results are kept by the setting's name, so that an
    interrupted search goes on with the next setting, and the seconds of all count.

    Args:
        minutes: time for all settings of all tasks.
        tried: results of an earlier part of the search.
        keep: is called with ``tried`` after each setting.

    Attributes:
        tried: ``quality`` on the validation split and ``seconds`` of each tried setting, by its name.
        total: number of settings of the whole search, which the baseline counts up.
    """

    def __init__(
        self,
        minutes: float = math.inf,
        tried: Mapping[str, Mapping[str, float]] | None = None,
        keep: Callable[[dict[str, dict[str, float]]], None] = lambda tried: None,
    ) -> None:
        self.minutes, self.keep, self.total = minutes, keep, 0
        self.tried = {name: dict(result) for name, result in (tried or {}).items()}

    @property
    def seconds(self) -> float:
        return sum(result["seconds"] for result in self.tried.values())

    def quality(self, name: str, run: Callable[[], float], until: float = math.inf) -> float | None:
        """Return the quality of a setting, which ``run()`` measures where it is not known; None where time is up.

        Args:
            name: name of the setting.
            run: tries the setting and returns its quality.
            until: share of the minutes within which the setting is begun.
        """
        if name not in self.tried:
            if self.seconds >= 60 * self.minutes * until:
                return None
            began = time.perf_counter()
            quality = run()
            self.tried[name] = {"quality": quality, "seconds": time.perf_counter() - began}
            self.keep(self.tried)
        return self.tried[name]["quality"]
