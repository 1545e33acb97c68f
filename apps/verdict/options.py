"""The command line of ``moesaic verdict``, read and checked before anything heavy is imported."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from apps.base.checks import check_at_least
from apps.cli.configs import read_config, shipped
from apps.cli.errors import UsageError
from apps.cli.flags import SECTIONS
from apps.cli.parser import CommandLine, Folder, Shown
from apps.data.given import TargetKind

MOST_MINUTES = 7 * 24 * 60.0
_Column = Annotated[str, Shown("COLUMN")]


@dataclass(frozen=True)
class VerdictOptions(CommandLine):
    """Train a small sparse model and a dense one of equal FLOPs on your data, as often as the minutes allow, and say
    whether sparse pays: at equal FLOPs, and at equal time on this machine.

    DATA is a folder of images (a folder a class, or train/ and test/ with such folders), a folder of images with a
    table of their titles, a CSV, TSV or Parquet file or a folder of them with --target, two text files of which line i
    of one translates line i of the other, or a configuration. Values of the configuration may follow, as for moesaic
    fit: --data.batch_size 32. Stopped at any moment, the same command resumes.

    Attributes:
        data: a folder, a table, two text files, or a configuration
        output: folder of the verdict (default: runs/verdict/<name of the data>)
        minutes: time that it may take, set-up and all processes of a resumed one included
        seed: first seed of the final runs, which count up from it (default: 0)
        target: column of the table to predict; may be given again, for several tasks of one model
        kind: kind of the target, if there is one (default: as its values are)
        exclude: columns of the table to leave out
        time: split the rows by this column: the last ones test
        user: without --time, each value of this column is in one split; with it, the rows of a value count as one in
            the intervals
        open: open the page in the end

    Raises:
        UsageError: data that are missing, or the target of a configuration.
        ValueError: a value out of its range.
    """

    prog: ClassVar[str] = "moesaic verdict"
    sections: ClassVar[tuple[str, ...]] = SECTIONS

    data: Annotated[tuple[Path, ...], Shown("DATA", words=("data",), read=shipped)]
    output: Folder | None = None
    minutes: float = 30.0
    seed: int = 0
    target: Annotated[tuple[str, ...], Shown("COLUMN", one_each=True)] = ()
    kind: TargetKind | None = None
    exclude: Annotated[tuple[str, ...], Shown("COLUMN", adds=True)] = ()
    time: _Column | None = None
    user: _Column | None = None
    open: bool = False

    def __post_init__(self) -> None:
        if not (0 < self.minutes <= MOST_MINUTES and math.isfinite(self.minutes)):
            raise ValueError(f"minutes={self.minutes:g} must be above 0 and at most {MOST_MINUTES:g}, a week")
        check_at_least(0, seed=self.seed)
        if len(self.data) > 2:
            raise ValueError(f"DATA is one path, or two text files: got {len(self.data)}")
        for option, column in (("exclude", next(iter(self.exclude), None)), ("time", self.time), ("user", self.user)):
            if column is not None and not self.target:
                raise ValueError(f"--{option} {column} names a column of a table: name its target with --target")
        if self.is_config:
            read_config(self.data[0])
            if self.target:
                raise UsageError(
                    f"--target {self.target[0]}: {self.data[0]} is a configuration, which names its targets"
                )
        if self.kind is not None and len(self.target) != 1:
            raise UsageError(f"--kind {self.kind} is the kind of a table's target: name one with --target")
        if twice := next((column for column in self.target if self.target.count(column) > 1), None):
            raise UsageError(f"--target {twice} is given twice")
        for path in self.data:
            if not path.exists():
                raise UsageError(f"no file or folder {path}")

    @property
    def is_config(self) -> bool:
        return len(self.data) == 1 and self.data[0].suffix in (".yaml", ".yml")

    @property
    def folder(self) -> Path:
        """Folder of the verdict."""
        name = "-".join(dict.fromkeys(path.stem or path.name for path in self.data))
        return self.output or Path("runs") / "verdict" / name


OPTIONS = VerdictOptions
