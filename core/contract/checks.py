"""Checks that each field of a config is of the kind that its annotation says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "int": ("a whole number", lambda value: isinstance(value, int) and not isinstance(value, bool)),
    "float": ("a number", lambda value: isinstance(value, (int, float)) and not isinstance(value, bool)),
    "str": ("text", lambda value: isinstance(value, str)),
    "bool": ("True or False", lambda value: isinstance(value, bool)),
    "None": ("None", lambda value: value is None),
}


def check_kinds(config: Any, prefix: str = "") -> None:
    """Raise a ``ValueError`` where a field of a config is not of the kind that its annotation says.

    Args:
        config: a dataclass. Fields of other kinds than numbers, text, booleans and None are left to the config.
        prefix: text before the names of the fields in the message.
    """
    for f in fields(config):
        value, kind = getattr(config, f.name), f.type if isinstance(f.type, str) else getattr(f.type, "__name__", "")
        names = kind.split(" | ")
        if all(name in _KINDS for name in names) and not any(_KINDS[name][1](value) for name in names):
            allowed = " or ".join(_KINDS[name][0] for name in names)
            raise ValueError(f"{prefix}{f.name}={value!r} is not {allowed}")


def check_part(name: str, value: object, kind: type, example: str) -> None:
    """Raise a ``ValueError`` where a field that holds a config holds another thing; ``example`` is one that fits."""
    if not isinstance(value, kind):
        raise ValueError(f"{name}={value!r} is not a config of its kind, as {example} is")
