"""The command line of ``moesaic compare CONFIG --ladder RUNGS``."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from apps.cli.errors import UsageError
from apps.cli.parser import Shown
from apps.compare.options import Command


@dataclass(frozen=True, kw_only=True)
class Ladder(Command):
    """Train the sparse model of a configuration and a dense one of equal FLOPs at several budgets of training FLOPs,
    and say whether the gain grows with the budget, with curves that expect the next rung.

    The section ladder of the configuration says how the model grows; the steps of a rung follow from its budget. The
    learning rate is searched on the two lowest rungs and follows the section's rule on the others. What will be called
    a gain is written to gates.json before anything is trained. Stopped at any moment, the same command resumes; higher
    rungs may be added later.

    Attributes:
        ladder: budgets as multiples of the configuration's training FLOPs, rising, such as 0.1,0.3,1,3
        minutes: begin no rung that does not fit into the rest of so many minutes, by the time of the one before
        baselines: those to train, besides the sparse model (default: the dense one of equal FLOPs)
        output: folder of the ladder (default: runs/ladder/<config name>)

    Raises:
        UsageError: fewer than two rungs, or rungs that do not rise.
        ValueError: a value out of its range.
    """

    prog: ClassVar[str] = "moesaic compare"

    ladder: Annotated[str, Shown("RUNGS")]
    minutes: float | None = None

    def __post_init__(self) -> None:
        if self.minutes is not None and not self.minutes > 0:
            raise UsageError(f"--minutes {self.minutes:g} must be positive")
        assert self.rungs
        super().__post_init__()

    @property
    def rungs(self) -> tuple[float, ...]:
        """The rungs as numbers."""
        try:
            rungs = tuple(float(word) for word in self.ladder.split(","))
        except ValueError:
            raise UsageError(f"--ladder {self.ladder}: give numbers with commas, such as 1,3,10,30") from None
        if len(rungs) < 2:
            raise UsageError(f"--ladder {self.ladder} is one rung: a trend needs two, and a fit that is tested three")
        if not all(0 < low < high < math.inf for low, high in itertools.pairwise(rungs)):
            raise UsageError(f"--ladder {self.ladder} must rise from above 0")
        return rungs

    @property
    def folder(self) -> Path:
        """Folder of the ladder."""
        return self.output or Path("runs") / "ladder" / self.name
