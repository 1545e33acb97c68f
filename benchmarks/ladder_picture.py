"""Draw the picture of ladders that the docs show, from the files that ``moesaic compare --ladder`` wrote.

    python benchmarks/ladder_picture.py docs/img/report/ladder.png "the Bible=docs/runs/ladder_bible.json" \
        "descriptions of Debian's packages=docs/runs/ladder_debian.json"
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from apps.compare.ladder.curves import Measured
from apps.compare.ladder.page import Story
from apps.compare.ladder.rungs import Outcome, Rung
from apps.report.page import ScatterChart, save_charts

TITLE = "Sparse and dense language models of equal FLOPs, three seeds; dashed: expected, not measured"


def story_of(numbers: dict[str, Any]) -> Story:
    """Return the story of a ladder from its file, whose losses are rounded."""
    outcomes = []
    for place, rung in enumerate(numbers["rungs"]):
        kinds = {}
        for name, own in rung["kinds"].items():
            shares = np.array(own["shares"])
            kinds[name] = Measured(own["flops"], own["seconds"], np.array(own["blocks"]), shares / shares.sum())
        turned = {name: own["turned"] for name, own in rung["kinds"].items()}
        rates = {name: (own["learning_rate"], False) for name, own in rung["kinds"].items()}
        known = Rung(rung["rung"], place, rung["options"], rung["steps"], 0, rung["flops"], ())
        outcomes.append(Outcome(known, kinds, rates, turned, 0.0))
    return Story(outcomes, "loss")


def chart_of(title: str, file: Path) -> ScatterChart:
    """Return the losses over FLOPs of a ladder's file."""
    return replace(story_of(json.loads(file.read_text(encoding="utf-8"))).charts()[0], title=title)


def main(arguments: list[str]) -> None:
    picture, *ladders = arguments
    charts = [chart_of(title, Path(file)) for title, _, file in (ladder.partition("=") for ladder in ladders)]
    save_charts(charts, Path(picture), TITLE)


if __name__ == "__main__":
    main(sys.argv[1:])
