"""``moesaic compare --suite FILE``: a queue of trainings, board by board, which goes on where it was and writes a
leaderboard.

The modules, from the ground up: ``file`` (the command line, and the suite file: boards and their entries),
``standings`` (what finished runs have shown, as JSON and as the rows of a board), ``queue`` (the runs, in order),
``page`` (how they are shown), ``command`` (the whole).
"""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    """Run ``moesaic compare ARGV``, where ARGV has ``--suite FILE``."""
    from apps.base.imports import importing
    from apps.compare.suite.file import Command

    command = Command.read(argv)  # a wrong one ends here, before torch is imported

    with importing():
        from apps.compare.suite.command import run

    return run(command, argv)
