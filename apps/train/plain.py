"""Config dataclasses as the plain values of YAML files and checkpoints, and back."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import core
from apps.base.messages import unknown_name

T = TypeVar("T")


def as_config(kind: type[T], value: Any, option: str) -> Any:
    """Return ``value`` as a config of class ``kind``, where it is a mapping of options, as ``config.yaml`` has it.

    Configs and None are returned as they are. Of a class with several subclasses the mapping names one:
    ``{"class_path": "core.MMoE", "init_args": {...}}``. Only classes of ``kind`` and registered ones are made
    (``core.register_config``), and nothing is imported.

    Args:
        kind: the dataclass.
        value: what the constructor was given.
        option: names it in messages.

    Raises:
        ValueError: it is neither, names an unknown option or class, or has a value that the class refuses.

    Example::

        as_config(SplitConfig, {"kind": "time", "val": 0.1}, "split")     # SplitConfig(kind="time", val=0.1)
    """
    if value is None or isinstance(value, kind):
        return value
    if not isinstance(value, Mapping):
        raise ValueError(f"{option}={value!r} is neither a {kind.__name__} nor a mapping of its options")
    named, arguments = kind, value
    if "class_path" in value:
        named, arguments = _class(kind, value["class_path"], option), value.get("init_args") or {}
    hints, known = typing.get_type_hints(named), [f.name for f in dataclasses.fields(named) if f.init]  # type: ignore[arg-type]
    made = {}
    for name, given in arguments.items():
        if name not in known:
            raise ValueError(unknown_name(f"option of {option}", name, sorted(known)))
        made[name] = _value(hints[name], given, f"{option}.{name}")
    try:
        return named(**made)
    except TypeError as error:
        raise ValueError(f"{option}: {error}") from error


def _class(kind: type, class_path: Any, option: str) -> type:
    own = class_path in (kind.__qualname__, f"{kind.__module__}.{kind.__qualname__}")
    named = kind if own else core.registered_config(class_path)
    if not issubclass(named, kind):
        raise ValueError(f"{option}.class_path={class_path!r} is no {kind.__name__}")
    return named


def _value(hint: Any, value: Any, option: str) -> Any:
    """``value`` as what a field with this hint holds: configs from mappings, tuples from lists."""
    kinds = [hint, *typing.get_args(hint)] if typing.get_origin(hint) not in (tuple, dict) else [hint]
    config = next((k for k in kinds if isinstance(k, type) and dataclasses.is_dataclass(k)), None)
    if isinstance(value, Mapping):
        origin, arguments = typing.get_origin(hint), typing.get_args(hint)
        if origin is not None and isinstance(origin, type) and issubclass(origin, Mapping):
            return {name: _value(arguments[1], given, f"{option}.{name}") for name, given in value.items()}
        return value if config is None else as_config(config, value, option)
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        tuples = [k for k in kinds if typing.get_origin(k) is tuple]
        if tuples:
            element = typing.get_args(tuples[0])[0]
            return tuple(_value(element, given, option) for given in value)
    return value


def to_plain(value: Any) -> Any:
    """Return ``value`` as plain dicts, lists and numbers; a dataclass as ``{"class_path": ..., "init_args": ...}``.

    Raises:
        ValueError: a dataclass that is not registered: ``from_plain`` could not make it again.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        path = f"{type(value).__module__}.{type(value).__qualname__}"
        if not core.is_registered(type(value)):
            raise ValueError(f"no checkpoint can be loaded with a {path}: decorate the class with core.register_config")
        fields = {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value) if f.init}
        return {"class_path": path, "init_args": fields}
    if isinstance(value, Mapping):
        return {str(k): to_plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [to_plain(v) for v in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return str(value)


def from_plain(value: Any) -> Any:
    """Return what ``to_plain`` made ``value`` of, with the config dataclasses of class_path back; lists stay lists.

    Raises:
        ValueError: a class_path that is not registered (``core.register_config``), or arguments that its class refuses.
    """
    if isinstance(value, list):
        return [from_plain(v) for v in value]
    if not isinstance(value, dict):
        return value
    if set(value) != {"class_path", "init_args"}:
        return {k: from_plain(v) for k, v in value.items()}
    kind = core.registered_config(value["class_path"])
    try:
        return kind(**{k: from_plain(v) for k, v in value["init_args"].items()})
    except TypeError as error:
        raise ValueError(f"class_path={value['class_path']!r}: {error}") from error
