"""The command line of ``moesaic doctor``, read and checked before anything heavy is imported."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from apps.base.checks import check_at_least
from apps.cli import UsageError
from apps.cli.configs import read_config, shipped
from apps.cli.flags import check_data_options
from apps.cli.parser import Parser
from apps.train.checkpoint_paths import MEANING

_DESCRIPTION = """\
Name what is wrong with the routing of a run, with the evidence and a remedy: from its log, metrics.csv, and from a pass
over validation data. docs/reference/routers/findings.md explains each finding. The exit code is 0 where nothing is
wrong, and 1 where something is."""
_EPILOG = """\
Any --data.KEY VALUE names other data, such as --data.val_files PATH. A run that is still in training may be looked at:
without a checkpoint or data its log is read alone."""


@dataclass(frozen=True)
class Options:
    """A command line of ``moesaic doctor``, checked without reading a model.

    Attributes:
        run: folder of a run, or a checkpoint.
        batches: validation batches; 0: the log alone.
        ablate: also score the run without each of its experts.
        config: configuration of the run, where none lies beside its checkpoint.
        data: further words of the command line, ``--data.KEY VALUE``.
    """

    run: Path
    batches: int
    ablate: bool
    config: Path | None
    data: tuple[str, ...]

    @classmethod
    def read(cls, argv: Sequence[str]) -> Options:
        """Read ``argv``, the arguments after ``moesaic doctor``.

        Raises:
            UsageError: an unknown option, or an ablation without batches.
            ValueError: a value out of its range.
        """
        values, rest = command_line().parse_known_args(list(argv))
        check_data_options(rest, "doctor")
        check_at_least(0, batches=values.batches)
        if values.ablate and not values.batches:
            raise UsageError("--ablate scores the run on validation batches, and --batches is 0")
        if values.config is not None:
            read_config(shipped(Path(values.config)))  # a missing or wrong one is refused here
        config = None if values.config is None else shipped(Path(values.config))
        return cls(Path(values.ckpt_path), values.batches, values.ablate, config, tuple(rest))


def command_line() -> Parser:
    """Return the parser of the command."""
    parser = Parser(
        prog="moesaic doctor",
        allow_abbrev=False,
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--ckpt_path", required=True, metavar="RUN", help=MEANING)
    add("--batches", type=int, default=8, metavar="N", help="validation batches; 0: the log alone (default: 8)")
    add("--ablate", action="store_true", help="also show the score without each expert, a validation for each")
    add("--config", metavar="FILE", help="configuration of the run, where none lies beside its checkpoint")
    return parser
