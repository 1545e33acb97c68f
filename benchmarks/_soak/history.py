"""Losses that are kept in docs/runs are those of today."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from benchmarks._soak.outcome import Outcome

WEIGHT = 1


def cases(numbers: Iterator[int], folder: Path) -> Iterator[Outcome]:
    """Yield a case for each configuration."""
    for number in numbers:
        yield Outcome(number, "losses: nothing yet", count=0)
        return
