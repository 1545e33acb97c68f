"""The parser of commands that take no configuration apart."""

from __future__ import annotations

import argparse

from apps.cli import UsageError


class Parser(argparse.ArgumentParser):
    """A wrong option is a ``UsageError``, in place of the usage and an exit."""

    def error(self, message: str) -> None:  # type: ignore[override]
        raise UsageError(message)
