"""``moesaic bench NAME``: runs ``benchmarks/NAME.py`` of the source tree."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from apps.cli.errors import UsageError

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


def main(argv: Sequence[str]) -> int:
    """Run ``moesaic bench ARGV``: the name of a benchmark, then its own options.

    Raises:
        UsageError: no such benchmark, or no source tree beside this package.
    """
    names = sorted(p.stem for p in FOLDER.glob("[!_]*.py"))
    if not names:
        raise UsageError(f"no benchmarks in {FOLDER}: they are in the source tree, install it with pip install -e .")
    if not argv or argv[0] in ("-h", "--help"):
        print(f"usage: moesaic bench {'|'.join(names)} [options]; --help after the name lists them")
        return 0
    if argv[0] not in names:
        raise UsageError(f"{argv[0]!r} is no benchmark; there is {', '.join(names)}")
    return int(load(argv[0]).main(list(argv[1:])) or 0)


def load(name: str) -> Any:
    """Import and return the module ``benchmarks/NAME.py``, which no package holds."""
    spec = importlib.util.spec_from_file_location(f"benchmarks.{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    if str(FOLDER.parent) not in sys.path:
        sys.path.append(str(FOLDER.parent))  # benchmarks share modules, wherever the command was typed
    spec.loader.exec_module(module)
    return module
