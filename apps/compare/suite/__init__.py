"""``moesaic compare --suite FILE``: a queue of trainings, board by board, which goes on where it was and writes a
leaderboard.

The modules, from the ground up: ``options`` (the command line), ``file`` (the suite file: boards and their entries),
``figures`` (what finished runs have shown, as JSON), ``queue`` (the runs, in order), ``standings`` (the rows of a
board), ``markdown`` and ``page`` (how they are shown), ``command`` (the whole).
"""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    """Run ``moesaic compare ARGV``, where ARGV has ``--suite FILE``."""
    from apps.base.imports import importing
    from apps.compare.suite.options import Command

    command = Command.read(argv)  # a wrong one ends here, before torch is imported

    with importing():
        from apps.compare.suite.command import run

    return run(command, argv)
