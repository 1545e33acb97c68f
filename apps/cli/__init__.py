"""The command ``moesaic``. Nothing heavy is imported here: ``moesaic --help`` answers at once."""

from apps.cli.command import main

__all__ = ["main"]
