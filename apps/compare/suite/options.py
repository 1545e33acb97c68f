"""The command line of ``moesaic compare --suite FILE``, read and checked before anything heavy is imported."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, ClassVar

from apps.cli.errors import UsageError
from apps.cli.parser import CommandLine, Folder, Shown
from apps.compare.suite.file import Suite


@dataclass(frozen=True)
class Command(CommandLine):
    """Train the models of a suite file, each with several seeds at the learning rate of its configuration, and write a
    leaderboard: the boards with their test figures and costs, as Markdown and as one HTML file.

    Stopped at any moment, the same command goes on: a finished run is not trained again, and an unfinished one goes on
    from its last checkpoint. The figures of finished runs are JSON files; where these are, the folders of the runs are
    no longer needed. With --minutes 0 nothing is trained, and the leaderboard is written anew.

    Attributes:
        file: the suite file, such as configs/suites/recommenders.yaml
        boards: train these boards alone; the leaderboard still has all
        minutes: stop after so long, with what is at work kept (default: no limit)
        figures: folder of the figures of finished runs (default: that of the suite file)
        output: folder of the runs (default: that of the suite file)
        rounds: timed rounds of speed and memory; 0: none
        open: show the page in the browser

    Raises:
        UsageError: a suite file that is not there or is none.
        ValueError: a value out of its range, or a suite that breaks a rule.
    """

    prog: ClassVar[str] = "moesaic compare"

    file: Annotated[Path, Shown("FILE", words=("--suite",))]
    boards: tuple[str, ...] = ()
    minutes: float | None = None
    figures: Folder | None = None
    output: Folder | None = None
    rounds: int = 5
    open: bool = False

    def __post_init__(self) -> None:
        if self.minutes is not None and not (self.minutes >= 0 and math.isfinite(self.minutes)):
            raise UsageError(f"--minutes {self.minutes:g} must not be negative")
        if self.rounds < 0:
            raise UsageError(f"--rounds {self.rounds} must not be negative")
        assert self.suite  # a wrong file is an error before anything heavy is imported

    @functools.cached_property
    def suite(self) -> Suite:
        """The suite, with the folders and boards that the command line gives."""
        suite = Suite.read(self.file)
        suite = suite.with_boards(self.boards) if self.boards else suite
        return replace(suite, runs=str(self.output or suite.runs), figures=str(self.figures or suite.figures))
