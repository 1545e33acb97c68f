"""``moesaic compare CONFIG``: the sparse model of a configuration beside dense ones of equal cost, on the same data.

The modules, from the ground up: ``options`` (the command line), ``stats`` (intervals and verdicts), ``systems`` (the
models and their costs), ``experiment`` (a configuration, made again at will), ``training`` (one unit of work), ``plan``
(all units), ``measure`` (speed and memory), ``summary`` and ``table`` (the numbers and how they are shown), ``work``
(all units, in order), ``command`` (the whole). ``suite`` is a queue of many comparisons, ``moesaic compare --suite
FILE``.
"""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    """Run ``moesaic compare ARGV``."""
    if any(word.partition("=")[0] == "--suite" for word in argv):
        from apps.compare.suite import main as suite

        return suite(argv)
    from apps.base.imports import importing
    from apps.compare.options import Command

    Command.read(argv)  # a wrong one ends here, before torch is imported

    with importing():
        from apps.compare.command import run

    return run(argv)
