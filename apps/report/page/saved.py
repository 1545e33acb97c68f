"""The codec between the parts of a page and JSON, by which one command keeps what another one shows."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from apps.report.page import charts, parts

_CLASSES: dict[str, type] = {
    kind.__name__: kind
    for module in (charts, parts)
    for kind in vars(module).values()
    if isinstance(kind, type) and dataclasses.is_dataclass(kind) and kind.__module__ == module.__name__
}
_NAME = "class"


def to_json(value: Any) -> Any:
    """Return a part, or a sequence of parts, as dicts, lists, numbers and texts; a dict names its class."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {_NAME: type(value).__name__, **fields}
    if isinstance(value, dict):
        return {name: to_json(item) for name, item in value.items()}
    if isinstance(value, np.generic):
        return value.item()
    return [to_json(item) for item in value] if isinstance(value, (list, tuple)) else value


def from_json(value: Any) -> Any:
    """Return what ``to_json`` made a value of; sequences are tuples.

    Raises:
        ValueError: a class that is no part of a page, or fields that it does not have.
    """
    if isinstance(value, dict):
        fields = {name: from_json(item) for name, item in value.items()}
        name = fields.pop(_NAME, None)
        if name is None:
            return fields
        if name not in _CLASSES:
            raise ValueError(f"{name!r} is no part of a page")
        try:
            return _CLASSES[name](**fields)
        except TypeError as error:
            raise ValueError(f"{name}: {error}") from None
    return tuple(map(from_json, value)) if isinstance(value, list) else value
