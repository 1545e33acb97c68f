"""Configs as plain dicts, lists and numbers, and back: what YAML files and checkpoints hold."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

from ..experts import ExpertConfig
from ..registry import registered_config
from ..routing.balance import Balance
from ..routing.router import RouterConfig


def to_plain(value: Any) -> Any:
    """A config as a plain dict: one that may be of several classes names its class, balance weights do not."""
    if isinstance(value, tuple):
        return [to_plain(v) for v in value]
    if not is_dataclass(value) or isinstance(value, type):
        return value
    args = {f.name: to_plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Balance):
        return args
    kind = type(value)
    module = "core" if kind.__module__.split(".")[0] == "core" else kind.__module__
    return {"class_path": f"{module}.{kind.__qualname__}", "init_args": args}


def from_plain(value: Any, kind: type | tuple[type, ...] = (RouterConfig, ExpertConfig)) -> Any:
    """What ``to_plain`` was given; anything but a dict with a class is left as it is.

    Args:
        value: of a field.
        kind: what its class has to be.

    Raises:
        ValueError: the class is not registered, is of another kind, or has no such field.
    """
    if not isinstance(value, dict) or "class_path" not in value:
        return value
    named = registered_config(value["class_path"])
    if not issubclass(named, kind):
        what = "not a multi-gate config" if isinstance(kind, type) else "neither a router config nor an expert config"
        raise ValueError(f"class_path={value['class_path']!r} is {what}")
    return make(named, value.get("init_args", {}))


def make(kind: type, args: dict[str, Any]) -> Any:
    """A config of class ``kind`` from its fields as plain values or configs.

    Raises:
        ValueError: the class has no such field.
    """
    args = {name: from_plain(value) for name, value in args.items()}
    if isinstance(args.get("balance"), dict):
        args["balance"] = make(Balance, args["balance"])
    known = {f.name for f in fields(kind)}
    for name in args:
        if name not in known:
            raise ValueError(f"{kind.__name__} has no field {name!r}; it has {', '.join(sorted(known))}")
    return kind(**args)
