"""What scripts import: the engine's names, and the commands as functions. Nothing is imported before a name is used."""

from __future__ import annotations

import importlib
import os
import runpy
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import core
    from core import *  # of which mypy takes only the names that core itself lists
    from core.config import *
    from core.contract import *
    from core.convert import *
    from core.diagnose import *
    from core.experts import *
    from core.layers import *
    from core.offload import *
    from moesaic.commands import Predictions, Result, compare, fit, load, predict, test, verdict
    from moesaic.tables import TableClassifier, TableRegressor

    __all__ = ["Predictions", "Result", "compare", "fit", "load", "predict", "test", "verdict"]
    __all__ += ["TableClassifier", "TableRegressor"]
    __all__ += core.__all__

_COMMANDS = ("Predictions", "Result", "compare", "fit", "load", "predict", "test", "verdict")
_TABLES = ("TableClassifier", "TableRegressor")


def __getattr__(name: str) -> object:
    """Return a public name; the first one imports torch, and a command also Lightning."""
    if name.startswith("_") and name != "__all__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    file = os.path.join(os.path.dirname(os.path.dirname(os.path.realpath(__file__))), "apps", "base", "packages.py")
    if line := runpy.run_path(file)["shadowed"]():  # by its path, for the package apps may be another one
        raise ImportError(line)
    rooms = {**dict.fromkeys(_COMMANDS, "moesaic.commands"), **dict.fromkeys(_TABLES, "moesaic.tables")}
    source = importlib.import_module(rooms.get(name, "core"))
    if name == "__all__":
        return [*rooms, *source.__all__]
    if name not in source.__all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(source, name)
    return value


def __dir__() -> list[str]:
    return [*_COMMANDS, *_TABLES, *importlib.import_module("core").__all__]
