"""The first losses of each configuration are those that docs/runs keeps."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from benchmarks import first_losses
from benchmarks._soak.outcome import Outcome


def cases(numbers: Iterator[int], folder: Path) -> Iterator[Outcome]:
    """Yield a case for each configuration whose losses are kept and whose data are here."""
    kept, runs = json.loads(first_losses.KEPT.read_text()), first_losses.runs()
    for number in numbers:
        if number >= len(kept):
            return
        name = list(kept)[number]
        now = first_losses.losses(name, runs[name], {})
        is_here = not isinstance(now, str) or not now.endswith(first_losses.ABSENT)
        what = f"first losses: {name if is_here else now}"
        yield Outcome(number, what, first_losses.fault(name, now, kept[name]), int(is_here))
