"""``moesaic plan``: the memory, the traffic and the time of a training on many GPUs, from its configuration alone.

The modules, from the ground up: ``formulas`` (pure functions of plain numbers), ``gpus`` (published peaks of GPUs),
``measuring`` (what this machine reaches in their place), ``options`` (the command line), ``inputs`` (what a model needs
of its data, without the data), ``outline`` (a model on the meta device, measured), ``layout`` (how a mesh lies on
machines, and what a step costs on it), ``sweep`` (all layouts, and the best), ``display`` (table, overlay and picture),
``command`` (the whole).
"""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    """Run ``moesaic plan ARGV``."""
    from apps.base.imports import importing
    from apps.plan.options import Options

    options = Options.read(argv)  # a wrong one ends here, before torch is imported

    with importing():
        from apps.plan.command import run

    return run(options)
