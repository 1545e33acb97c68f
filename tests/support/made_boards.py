"""Small tables in place of those that a suite's boards name, which are downloaded otherwise."""

from __future__ import annotations

from pathlib import Path

import yaml


def make_tables(suite: Path, folder: Path) -> None:
    """Write 200 rows for each table of a suite, with the columns that its boards name, below ``folder``."""
    for board in yaml.safe_load(suite.read_text())["boards"]:
        if "data" not in board:
            continue
        path = folder / board["data"]
        path.parent.mkdir(parents=True, exist_ok=True)
        head = [board.get("time", "size"), "cost", *board["target"]]
        days = [f"2024-01-{1 + i % 28:02}" if "time" in board else i * 37 % 101 / 7 for i in range(200)]
        rows = [
            [str(day), f"{i % 19}.5", *(str((i + t) % 2) for t in range(len(head) - 2))] for i, day in enumerate(days)
        ]
        path.write_text("\n".join(map(",".join, [head, *rows])))
