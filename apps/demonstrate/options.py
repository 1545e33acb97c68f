"""The command line of ``moesaic demo``, read and checked before anything heavy is imported."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from apps.base.checks import check_at_least, check_installed
from apps.base.ports import check_port
from apps.cli.parser import CommandLine, Config, Run
from apps.train.checkpoint.paths import find_checkpoint

PORT = 7860
LIBRARIES = ("gradio",)


@dataclass(frozen=True)
class DemoOptions(CommandLine):
    """Open a page on this machine on which a trained model is tried out: an image and its classes, a sentence and its
    translation, a row and its probabilities, a history and the next items, each with the experts that computed it. The
    page is only for this machine (127.0.0.1) and asks nothing of the network. Ctrl-C ends it. docs/demo.md tells more.

    Attributes:
        config: configuration that names classes of your own, such as the run's
        port: port of the page; 0: a free one
        open: show the page in the browser
        examples: examples of the run's data; 0: none

    Raises:
        ValueError: a value out of its range, a port that is in use, or Gradio is not installed.
        FileNotFoundError: the checkpoint does not exist.
    """

    prog: ClassVar[str] = "moesaic demo"

    ckpt_path: Run
    config: Config | None = None
    port: int = PORT
    open: bool = False
    examples: int = 6

    def __post_init__(self) -> None:
        check_at_least(0, examples=self.examples)
        find_checkpoint(self.ckpt_path)
        check_port(self.port)
        check_installed("moesaic demo", LIBRARIES, "demo")

    @property
    def checkpoint(self) -> Path:
        return find_checkpoint(self.ckpt_path)


OPTIONS = DemoOptions
