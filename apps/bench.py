"""``moesaic bench``: runs the scripts of ``benchmarks/``, which come with a checkout of the repository."""

from __future__ import annotations

import runpy
from collections.abc import Sequence
from pathlib import Path

_FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"
BENCHMARKS = {"layer": "an MoE layer, forward and backward, against a dense FFN of equal active FLOPs"}

_HELP = "\n".join(
    [
        "usage: moesaic bench NAME [options]",
        "",
        "Measure speed on this machine, which should be idle.",
        "",
        *(f"  {name:<10}{text}" for name, text in BENCHMARKS.items()),
        "",
        "`moesaic bench NAME --help` tells the options.",
    ]
)


def main(argv: Sequence[str] = ()) -> int:
    """Run ``moesaic bench ARGV``.

    Raises:
        ValueError: the benchmark is unknown, or its script is not here.
    """
    if not argv or argv[0] in ("-h", "--help"):
        print(_HELP)
        return 0
    name, *rest = argv
    if name not in BENCHMARKS:
        raise ValueError(f"benchmark {name!r} is not one of {', '.join(BENCHMARKS)}")
    script = _FOLDER / f"{name}.py"
    if not script.exists():
        raise ValueError(f"{script} is missing: benchmarks come with a checkout of the repository")
    return int(runpy.run_path(str(script))["main"](rest) or 0)
