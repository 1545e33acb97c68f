"""Rounds of the benchmarks that train systems in turn, and the figures of their tables."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence


def in_turn(loops: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Return the seconds that each loop gives in each round, by system; one round before them warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    for number in range(rounds + 1):
        for name, loop in loops.items():
            spent = loop()
            if number:
                seconds[name].append(spent)
    return seconds


def rates(
    seconds: Mapping[str, Sequence[float]], units: float, peer: str
) -> Iterator[tuple[str, list[float], float | None]]:
    """Yield the name of each system, the quartiles of its rate, and the median of its ratio to the peer's.

    Args:
        seconds: of each round, by system.
        units: what a round works off, such as thousands of rows.
        peer: name of the system that others are compared with; where it has no times, the ratio is None.
    """
    for name, times in seconds.items():
        each = [units / spent for spent in times]
        quartiles = statistics.quantiles(each, n=4) if len(each) > 1 else each * 3
        of_peer = seconds.get(peer)
        ratio = None if of_peer is None else statistics.median(p / s for p, s in zip(of_peer, times, strict=True))
        yield name, quartiles, ratio
