"""The command line of ``moesaic demo``, read and checked before anything heavy is imported."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from apps.base.checks import check_at_least
from apps.base.ports import check_port
from apps.cli.parser import Parser
from apps.demonstrate.library import check_library
from apps.demonstrate.serving import PORT
from apps.train.checkpoint_paths import MEANING, find_checkpoint

_DESCRIPTION = """\
Open a page on this machine on which a trained model is tried out: an image and its classes, a sentence and its
translation, a row and its probabilities, a history and the next items, each with the experts that computed it. The page
is for this machine alone (127.0.0.1) and asks nothing of the network. Ctrl-C ends it. docs/demo.md tells more."""


@dataclass(frozen=True)
class Options:
    """A command line of ``moesaic demo``, checked without reading a model.

    Attributes:
        checkpoint: the checkpoint.
        port: port of the page; 0: any that is free.
        opens: whether the page is shown in the browser.
        examples: number of examples of the run's data; 0: the data are not read.
    """

    checkpoint: Path
    port: int
    opens: bool
    examples: int

    @classmethod
    def read(cls, argv: Sequence[str]) -> Options:
        """Read ``argv``, the arguments after ``moesaic demo``.

        Raises:
            UsageError: an unknown option.
            ValueError: a value out of its range, a port that is in use, or Gradio is not installed.
            FileNotFoundError: there is no checkpoint.
        """
        values = command_line().parse_args(list(argv))
        check_at_least(0, examples=values.examples)
        checkpoint = find_checkpoint(values.ckpt_path)
        check_port(values.port)
        check_library()
        return cls(checkpoint, values.port, values.open, values.examples)


def command_line() -> Parser:
    """Return the parser of the command."""
    parser = Parser(
        prog="moesaic demo",
        allow_abbrev=False,
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--ckpt_path", required=True, metavar="RUN", help=MEANING)
    add("--config", metavar="FILE", help="configuration that names classes of your own, such as that of the run")
    add("--port", type=int, default=PORT, metavar="N", help=f"port of the page; 0: a free one (default: {PORT})")
    add("--open", action="store_true", help="show the page in the browser")
    add("--examples", type=int, default=6, metavar="N", help="examples of the run's data; 0: none (default: 6)")
    return parser
