"""``moesaic demo``: a page on this machine on which a trained model is tried out, and shows its experts at work.

The modules, from the ground up: ``options`` (the command line), ``library`` (Gradio, which is optional), ``examples``
(the run's own data, where they are on this machine), ``drawing`` (answers and experts as HTML), ``page`` (the page in
Gradio), ``serving`` (the server, for this machine alone), ``command`` (the whole).
"""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    """Run ``moesaic demo ARGV`` until it is stopped by Ctrl-C.

    Returns:
        0.
    """
    from apps.base.imports import importing
    from apps.demonstrate.options import Options

    options = Options.read(argv)  # a wrong one ends here, before torch is imported

    with importing():
        from apps.demonstrate.command import run

    return run(options)
