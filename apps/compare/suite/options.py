"""The command line of ``moesaic compare --suite FILE``, read and checked before anything heavy is imported."""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from apps.cli.errors import UsageError
from apps.cli.parser import Parser
from apps.compare.suite.file import Suite

_DESCRIPTION = """\
Train the models of a suite file, each with several seeds at the learning rate of its configuration, and write a
leaderboard: the boards with their test figures and costs, as Markdown and as one HTML file."""

_EPILOG = """\
Stopped at any moment, the same command goes on: a finished run is not trained again, and an unfinished one goes on from
its last checkpoint. The figures of finished runs are JSON files; where these are, the folders of the runs are no longer
needed. With --minutes 0 nothing is trained, and the leaderboard is written anew."""


@dataclass(frozen=True)
class Command:
    """A command line of ``moesaic compare --suite FILE`` with the suite that it names.

    Attributes:
        suite: the suite, with the folders and boards that the command line gives.
        minutes: time for this call; None: until all is done.
        rounds: timed rounds of speed and memory; 0 measures nothing.
        opens: the page is shown in the browser.
    """

    suite: Suite
    minutes: float | None
    rounds: int
    opens: bool

    @classmethod
    def read(cls, argv: Sequence[str]) -> Command:
        """Read ``argv``, the arguments after ``moesaic compare``.

        Raises:
            UsageError: an unknown option, a wrong value, or a suite file that is not there or is none.
            ValueError: a suite that breaks a rule.
        """
        args = command_line().parse_args(list(argv))
        if args.minutes is not None and not (args.minutes >= 0 and math.isfinite(args.minutes)):
            raise UsageError(f"--minutes {args.minutes:g} must not be negative")
        if args.rounds < 0:
            raise UsageError(f"--rounds {args.rounds} must not be negative")
        suite = Suite.read(Path(args.suite))
        if args.boards:
            suite = suite.with_boards(args.boards)
        for option, folder in (("output", args.output), ("figures", args.figures)):
            if folder is not None and Path(folder).exists() and not Path(folder).is_dir():
                raise UsageError(f"--{option} {folder} is a file, not a folder")
        given = {"runs": args.output, "figures": args.figures}
        suite = dataclasses.replace(suite, **{name: value for name, value in given.items() if value is not None})
        return cls(suite, args.minutes, args.rounds, args.open)


def command_line() -> Parser:
    parser = Parser(
        prog="moesaic compare",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=_DESCRIPTION,
        epilog=_EPILOG,
    )
    add = parser.add_argument
    add("--suite", required=True, metavar="FILE", help="the suite file, such as configs/suites/recommenders.yaml")
    add("--boards", nargs="+", metavar="NAME", help="train these boards alone; the leaderboard still has all")
    add("--minutes", type=float, metavar="N", help="stop after so long, with what is at work kept (default: no limit)")
    add("--figures", metavar="DIR", help="folder of the figures of finished runs (default: that of the suite file)")
    add("--output", metavar="DIR", help="folder of the runs (default: that of the suite file)")
    add("--rounds", type=int, default=5, metavar="N", help="timed rounds of speed and memory; 0: none (default: 5)")
    add("--open", action="store_true", help="show the page in the browser")
    return parser
