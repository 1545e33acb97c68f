"""``moesaic verdict DATA``: does a sparse model pay on your own data, within a number of minutes?

The modules, from the ground up: ``options`` (the command line), ``schedule`` (what intervals show, and how many seeds
and steps fit), ``training`` (one run and its quality by example), ``work`` (all runs, in order), ``result`` (why it
lost, what would change the answer, and everything that is known in the end, as a page and as lines),
``command`` (the whole, with the configuration of the data).
"""

from __future__ import annotations

import time
from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    """Run ``moesaic verdict ARGV``."""
    began = time.monotonic()  # the imports are part of the budget
    from apps.base.imports import importing
    from apps.verdict.options import VerdictOptions

    options = VerdictOptions.read(argv)  # a wrong one ends here, before torch is imported

    with importing():
        from apps.verdict.command import run

    return run(options, argv, began)
