"""The command line of ``moesaic verdict``, read and checked before anything heavy is imported."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from apps.base.checks import check_at_least
from apps.cli.configs import read_config, shipped
from apps.cli.errors import UsageError
from apps.cli.parser import Parser
from apps.data.given import TargetKind

MOST_MINUTES = 7 * 24 * 60.0

_DESCRIPTION = """\
Train a small sparse model and a dense one of equal FLOPs on your data, as often as the minutes allow, and say whether
sparse pays: at equal FLOPs, and at equal time on this machine."""

_EPILOG = """\
DATA is a folder of images (a folder a class, or train/ and test/ with such folders), a folder of images with a table of
their titles, a CSV, TSV or Parquet file or a folder of them with --target, two text files of which line i of one
translates line i of the other, or a configuration. Values of the configuration may follow, as for moesaic fit:
--data.batch_size 32. Stopped at any moment, the same command goes on."""


@dataclass(frozen=True)
class Options:
    """The options of a verdict.

    Attributes:
        data: one path, or two text files.
        output: folder of the verdict.
        minutes: time that it may take, set-up and all processes of a resumed one included.
        seed: first seed of the final runs, which count up from it.
        target: column that is to be predicted.
        kind: kind of the target; None: as its values are.
        exclude: columns of the table that are no features.
        time, user: column of the table by which rows are split; None: not by it.
        opens: whether the page is opened in the end.
        rest: values of the configuration, ``--KEY.SUBKEY VALUE``.

    Raises:
        ValueError: a value out of its range.
    """

    data: tuple[Path, ...]
    output: Path
    minutes: float = 30.0
    seed: int = 0
    target: str | None = None
    kind: TargetKind | None = None
    exclude: tuple[str, ...] = ()
    time: str | None = None
    user: str | None = None
    opens: bool = False
    rest: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not (0 < self.minutes <= MOST_MINUTES and math.isfinite(self.minutes)):
            raise ValueError(f"minutes={self.minutes:g} must be above 0 and at most {MOST_MINUTES:g}, a week")
        check_at_least(0, seed=self.seed)
        if len(self.data) > 2:
            raise ValueError(f"DATA is one path, or two text files: got {len(self.data)}")
        if self.time is not None and self.user is not None:
            raise ValueError(f"--time {self.time} and --user {self.user}: rows are split by one of the two")
        for option, column in (("exclude", next(iter(self.exclude), None)), ("time", self.time), ("user", self.user)):
            if column is not None and self.target is None:
                raise ValueError(f"--{option} {column} names a column of a table: name its target with --target")

    @property
    def is_config(self) -> bool:
        return len(self.data) == 1 and self.data[0].suffix in (".yaml", ".yml")

    @classmethod
    def read(cls, argv: Sequence[str]) -> Options:
        """Read ``argv``, the arguments after ``moesaic verdict``.

        Raises:
            UsageError: an unknown option, data that are not there, or an output that is a file.
            ValueError: a value out of its range.
        """
        args, rest = command_line().parse_known_args(list(argv))
        for number, word in enumerate(rest):
            is_value = bool(number) and not word.startswith("--") and "=" not in rest[number - 1]
            if not (is_value or (word.startswith("--") and "." in word)):
                raise UsageError(f"{word} is no option of moesaic verdict (--help lists them)")
        data = tuple(shipped(Path(path)) for path in args.data)
        name = "-".join(dict.fromkeys(path.stem or path.name for path in data))
        output = Path(args.output) if args.output else Path("runs") / "verdict" / name
        columns = (args.target, args.kind, tuple(args.exclude), args.time, args.user)
        options = cls(data, output, args.minutes, args.seed, *columns, args.open, tuple(rest))
        if options.is_config:
            read_config(data[0])
            if options.target is not None:
                raise UsageError(f"--target {options.target}: {data[0]} is a configuration, which names its targets")
        if options.kind is not None and options.target is None:
            raise UsageError(f"--kind {options.kind} is the kind of a table's target: name it with --target")
        for path in data:
            if not path.exists():
                raise UsageError(f"no file or folder {path}")
        if output.exists() and not output.is_dir():
            raise UsageError(f"--output {output} is a file, not a folder")
        return options


def command_line() -> Parser:
    parser = Parser(
        prog="moesaic verdict",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=_DESCRIPTION,
        epilog=_EPILOG,
    )
    add = parser.add_argument
    add("data", nargs="+", metavar="DATA", help="a folder, a table, two text files, or a configuration")
    add("--target", metavar="COLUMN", help="column of the table to predict")
    add("--kind", choices=get_args(TargetKind), help="kind of the target (default: as its values are)")
    add("--exclude", nargs="+", action="extend", default=[], metavar="COLUMN", help="columns of the table to leave out")
    add("--time", metavar="COLUMN", help="split the rows by this column: the last ones test")
    add("--user", metavar="COLUMN", help="split the rows by this column: each of its values is in one split")
    add("--minutes", type=float, default=30.0, metavar="N", help="time it may take (default: 30)")
    add("--output", metavar="DIR", help="folder of the verdict (default: runs/verdict/<name of the data>)")
    add("--seed", type=int, default=0, metavar="N", help="first seed of the final runs (default: 0)")
    add("--open", action="store_true", help="open the page in the end")
    return parser
