"""The argument parser of the commands that take no configuration."""

from __future__ import annotations

import argparse

from apps.cli.errors import UsageError


class Parser(argparse.ArgumentParser):
    """An argument parser that raises a ``UsageError`` for a wrong option, and does not exit."""

    def error(self, message: str) -> None:  # type: ignore[override]
        raise UsageError(message)
