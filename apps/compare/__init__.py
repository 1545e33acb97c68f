"""``moesaic compare CONFIG``: the sparse model of a configuration beside dense ones of equal cost, on the same data.

The rooms, from the ground up: ``stats`` (intervals and what they allow to be said), ``files`` (atomic JSON),
``systems`` (what is compared, its cost, what may be called equal), ``experiment`` (a configuration, made anew at will),
``training`` and ``parallel`` (one unit of work, and several at a time),
``plan`` (the options and all units), ``measure`` (speed and memory), ``summary`` and
``table`` (the numbers and how they are shown), ``command`` (the command line, and the order of the work).
"""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    """Run ``moesaic compare ARGV``."""
    from apps.compare.command import run

    return run(argv)
