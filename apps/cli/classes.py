"""Classes by name: the short names of public ones, names on the command line, and the imported class."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from typing import Any

from apps import registry


def app_classes(part: str) -> dict[str, str]:
    """Return the class paths of the apps' models or data modules, by short name.

    Args:
        part: "model" or "data".
    """
    names = registry.DATA if part == "data" else registry.MODELS
    return {name: str(registry.full_path(name)) for name in sorted(names)}


def long_name(part: str, name: str) -> str:
    """Return the class path of a short name: an app's model or data module, or torch's optimizer or scheduler.

    torchrec has optimizers of the same names. Any other name is returned as it is.
    """
    if part in ("model", "data"):
        path = registry.full_path(name) or name
        return path if path in app_classes(part).values() else name
    if name == "ReduceLROnPlateau":  # Lightning's names the metric that it monitors
        return f"lightning.pytorch.cli.{name}"
    home = {"optimizer": "torch.optim", "lr_scheduler": "torch.optim.lr_scheduler"}[part]
    return f"{home}.{name}" if name.isidentifier() and name not in ("null", "none", "None") else name


def with_long_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration with the class paths of public classes instead of their short names."""
    out = dict(config)
    for part in ("model", "data", "optimizer", "lr_scheduler"):
        written = config.get(part)
        if isinstance(written, str):
            out[part] = long_name(part, written)
        elif isinstance(written, Mapping) and isinstance(written.get("class_path"), str):
            out[part] = {**written, "class_path": long_name(part, written["class_path"])}
    return out


def with_short_names(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration with the short names of public classes, the trainer's too, where any is read."""
    out = dict(config)
    for part in ("model", "data"):
        if isinstance(written := config.get(part), Mapping) and "class_path" in written:
            out[part] = {**written, "class_path": registry.name_of(written["class_path"])}
    if "trainer" in config:
        out["trainer"] = registry.renamed(config["trainer"], registry.name_of)
    return out


def load_class(path: str | None) -> Any:
    """Import and return the class of a class path; None if the module, or the name in it, does not exist.

    Raises:
        ImportError: the module exists, but a module that it imports does not.
    """
    module, _, name = (path or "").rpartition(".")
    if not module:
        return None
    try:
        return getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError as error:
        if error.name and module.startswith(error.name):
            return None
        raise


def named_class_path(part: str, config: Mapping[str, Any]) -> str | None:
    """Return the class path of "model" or "data" that a configuration names; None: it names none."""
    written = config.get(part)
    return written if isinstance(written, str) else written.get("class_path") if isinstance(written, Mapping) else None


def find_class(part: str, config: Mapping[str, Any]) -> type | None:
    """Return the class of "model" or "data"; None if none is named, or the class does not exist."""
    path = named_class_path(part, config)
    if not path:
        return None
    if "." in path:
        return load_class(path)

    from lightning.pytorch import LightningDataModule, LightningModule

    base = LightningDataModule if part == "data" else LightningModule
    return next((k for k in registry.subclasses(base) if k.__name__ == path), None)


def known_classes(base: type) -> dict[str, type]:
    """Return the classes below ``base`` that have been imported and can be made, by name; none below ``object``."""
    if base is object:
        return {}
    return {kind.__name__: kind for kind in registry.subclasses(base) if not inspect.isabstract(kind)}
