"""``moesaic convert KIND``: trained runs made sparse, dense, smaller or one, as a run that every command reads.

The modules, from the ground up: ``options`` (the command line), ``runs`` (a trained run, and the folder of a new one),
``streaming`` (a checkpoint written tensor by tensor), ``conversion`` (what a conversion is given and makes), ``kinds``
(each of them), ``figures`` (what a run costs and scores), ``command`` (the whole).
"""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    """Run ``moesaic convert ARGV``."""
    from apps.convert.options import read

    options = read(argv)  # a wrong one ends here, before torch is imported

    from apps.convert.command import run

    return run(options)
