"""The first losses of each configuration are those that docs/runs keeps."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from apps.base.files import CONFIGS
from benchmarks import first_losses
from benchmarks._soak.outcome import Outcome

WEIGHT = 1


def cases(numbers: Iterator[int], folder: Path) -> Iterator[Outcome]:
    """Yield a case for each configuration whose losses are kept and whose data are here."""
    kept = json.loads((CONFIGS.parent / "docs" / "runs" / "first_losses.json").read_text())
    runs = [(name, configs) for name, configs in first_losses.runs().items() if name in kept]
    for number in numbers:
        if number >= len(runs):
            return
        name, configs = runs[number]
        now = first_losses.losses(name, configs, {})
        if isinstance(now, str) and now.endswith("is not on this machine"):
            yield Outcome(number, f"first losses: {now}", count=0)
            continue
        same = not isinstance(now, str) and first_losses.is_same(name, now, kept[name])
        yield Outcome(number, f"first losses: {name}", "" if same else f"{now} in place of {kept[name]}")
