"""Counters of an offloaded model."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass
class OffloadStatistics:
    """Counts of the experts that calls needed, each once per call, and of the bytes that moved for them.

    Attributes:
        hits: experts that were on the device when a call needed them.
        misses: experts that were not.
        late: misses that a prefetch had begun to fetch.
        stall_seconds: time that calls waited for their misses.
        bytes_moved: bytes that were copied to the device, of prefetches too.
        prefetched: experts that were fetched before a call asked for them.
        unused: prefetched experts that gave way before a call asked for them.
    """

    hits: int = 0
    misses: int = 0
    late: int = 0
    stall_seconds: float = 0.0
    bytes_moved: int = 0
    prefetched: int = 0
    unused: int = 0

    @property
    def needed(self) -> int:
        """The experts that calls needed, once per call."""
        return self.hits + self.misses

    @property
    def hit_rate(self) -> float:
        """The share of the needed experts that were there; NaN before the first call."""
        return self.hits / self.needed if self.needed else float("nan")

    @property
    def foreseen_rate(self) -> float:
        """The share of the needed experts that were there or on their way; NaN before the first call.

        Unlike ``hit_rate`` it does not depend on how soon the fetching thread is given a processor.
        """
        return (self.hits + self.late) / self.needed if self.needed else float("nan")

    def __add__(self, other: OffloadStatistics) -> OffloadStatistics:
        names = [field.name for field in fields(self)]
        return OffloadStatistics(**{name: getattr(self, name) + getattr(other, name) for name in names})
