"""The command line of ``moesaic audit``, read and checked before anything heavy is imported."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar

from apps.cli.parser import CommandLine, Shown


@dataclass(frozen=True)
class AuditOptions(CommandLine):
    """Check the experts of a checkpoint without running it: tensors that are missing, misnamed, misplaced, untrained or
    damaged, routers that cannot choose, and experts that an adapter leaves out. docs/reference/commands/audit.md
    explains each finding. The exit code is 0 if nothing is wrong, and 1 if something is.

    Attributes:
        path: folder of safetensors files, also of an adapter, or one such file
        json: print the findings as a JSON list
    """

    prog: ClassVar[str] = "moesaic audit"

    path: Annotated[Path, Shown("PATH", words=("path",))]
    json: bool = False


OPTIONS = AuditOptions
