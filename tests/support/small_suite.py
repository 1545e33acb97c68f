"""A suite file of models that are as small as can be, and a command that reads it."""

from __future__ import annotations

from pathlib import Path

import yaml
from compared import CONFIG

from apps.compare.suite.file import Command


def small_suite(folder: Path, seeds: int = 2, **board: object) -> Path:
    """Write a suite with one board into ``folder``, and return its path; ``board`` has keys of the board.

    Its rows are "two of four", "all four", "centroids" and "none", which is left out. A run is an epoch of six steps.
    """
    config = folder / "tiny.yaml"
    if not config.exists():
        config.write_text(CONFIG)
    points = {
        "name": "Points",
        "config": str(config),
        "metrics": ["top1", "top2"],
        "values": {"trainer.max_epochs": 1, "model.offers": ["dense_equal_flops", "centroids", "none"]},
        "models": [{"name": "two of four"}, {"name": "all four", "values": {"model.moe.router": "core.Dense"}}],
        "baselines": ["centroids", "none"],
        **board,
    }
    places = {"runs": str(folder / "runs"), "figures": str(folder / "figures"), "leaderboard": str(folder / "board.md")}
    suite = {"title": "Tiny models", "seeds": seeds, **places, "boards": [points]}
    path = folder / "suite.yaml"
    path.write_text(yaml.safe_dump(suite, sort_keys=False))
    return path


def asked(path: Path, *more: str) -> list[str]:
    """Return the words of a command that goes on with a suite and measures no speed."""
    return ["compare", "--suite", str(path), "--rounds", "0", *more]


def read(path: Path, *more: str) -> Command:
    return Command.read(asked(path, *more)[1:])
