"""``moesaic compare CONFIG``: the sparse model of a configuration compared with dense ones of equal cost, on the same
data.

The modules, from the ground up: ``options`` (the command line), ``systems`` (the models and their costs),
``experiment`` (a configuration, made again at will), ``training`` (one unit of work), ``measure`` (speed and memory),
``summary`` (the numbers), ``work`` (the plan of all units, and these in order), ``page`` (the tables and the report),
``command`` (the whole). ``suite`` is a queue of many comparisons, ``moesaic compare --suite FILE``, and ``ladder`` one
configuration at several budgets, ``moesaic compare CONFIG --ladder RUNGS``.
"""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    """Run ``moesaic compare ARGV``."""
    from apps.base.imports import importing

    if any(word.partition("=")[0] == "--suite" for word in argv):
        from apps.compare.suite.file import Command as SuiteCommand

        suite = SuiteCommand.read(argv)  # a wrong one ends here, before torch is imported
        with importing():
            from apps.compare.suite.command import run as run_suite
        return run_suite(suite, argv)
    if any(word.partition("=")[0] == "--ladder" for word in argv):
        from apps.compare.ladder.options import Ladder

        ladder = Ladder.read(argv)
        with importing():
            from apps.compare.ladder.command import run as run_ladder
        return run_ladder(ladder, argv)
    from apps.compare.options import Command

    Command.read(argv)
    with importing():
        from apps.compare.command import run
    return run(argv)
