"""``moesaic doctor``: what is wrong with the routing of a trained run, or of one that is still in training.

The modules, from the ground up: ``options`` (the command line), ``log`` (what ``metrics.csv`` alone says), ``trial``
(the model on its validation data), ``command`` (the whole).
"""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    """Run ``moesaic doctor ARGV``.

    Returns:
        0 where nothing is wrong, 1 where there are findings.
    """
    from apps.base.imports import importing
    from apps.doctor.options import Options

    options = Options.read(argv)  # a wrong one ends here, before torch is imported

    with importing():
        from apps.doctor.command import run

    return run(options)
