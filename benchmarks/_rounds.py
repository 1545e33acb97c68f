"""Rounds of the benchmarks that run systems in turn, the figures of their tables, and the files of their rows."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from apps.base.machine import machine_facts


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


def write_rows(path: Path | None, rows: Sequence[Any], machine: Mapping[str, Any], **facts: Any) -> None:
    """Write rows, which are dataclasses, to a file of JSON with the machine, its folder too; None: nothing is written.

    Args:
        path: the file.
        rows: of the table.
        machine: what is said of the machine beside its own facts, such as versions and threads.
        facts: what else the file says of the measurement.
    """
    if path is None:
        return
    result = {"machine": {**machine_facts(), **machine}, **facts, "rows": [asdict(row) for row in rows]}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
