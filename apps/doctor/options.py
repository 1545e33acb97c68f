"""The command line of ``moesaic doctor``, read and checked before anything heavy is imported."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from apps.base.checks import check_at_least
from apps.cli.errors import UsageError
from apps.cli.parser import CommandLine, Config, Run, Shown


@dataclass(frozen=True)
class DoctorOptions(CommandLine):
    """Name the problems in the routing of a run, with the evidence and a remedy: from its log, metrics.csv, and from a
    pass over validation data. docs/reference/routers/findings.md explains each finding. The exit code is 0 if nothing
    is wrong, and 1 if something is.

    Any --data.KEY VALUE names other data, such as --data.val_files PATH. A run that is still in training may be looked
    at: without a checkpoint or data only its log is read.

    Attributes:
        batches: validation batches; 0: only the log
        ablate: also show the score without each expert, one validation per expert
        config: configuration of the run, if none lies next to its checkpoint
        data: new rows of a recommender on tables, CSV or Parquet: how they differ from its training rows, and nothing
            on the routing

    Raises:
        UsageError: an ablation without batches, or options of the routing with --data FILE.
        ValueError: a value out of its range.
    """

    prog: ClassVar[str] = "moesaic doctor"
    sections: ClassVar[tuple[str, ...]] = ("data",)

    ckpt_path: Run
    batches: int = 8
    ablate: bool = False
    config: Config | None = None
    data: Annotated[str, Shown("FILE")] | None = None

    def __post_init__(self) -> None:
        check_at_least(0, batches=self.batches)
        if self.data is not None and (self.ablate or self.rest):
            raise UsageError("--data FILE compares the columns of new rows: leave out --ablate and --data.KEY")
        if self.ablate and not self.batches:
            raise UsageError("--ablate scores the run on validation batches, and --batches is 0")


OPTIONS = DoctorOptions
