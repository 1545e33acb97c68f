"""The files of a comparison are written whole or not at all, so that a file that exists is finished."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from apps.base.files import replacing


def write_text(path: Path, text: str) -> Path:
    with replacing(path) as file:
        file.write(text)
    return path


def write_json(path: Path, value: Any) -> Path:
    return write_text(path, json.dumps(value, indent=1, allow_nan=True) + "\n")


def read_json(path: Path) -> Any:
    """Return the value in ``path``; None where there is no such file.

    Raises:
        ValueError: the file is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{path} is not a JSON file ({error}): delete it to have it made again") from None


def differences(saved: Any, wanted: Any, name: str = "") -> list[str]:
    """Return a line for each value that differs between two plain values, by its dotted name.

    Example::

        differences({"lr": 1, "seeds": 3}, {"lr": 1, "seeds": 5})     # ["seeds: 3 saved, 5 now"]
    """
    if isinstance(saved, Mapping) and isinstance(wanted, Mapping):
        lines = []
        for key in dict.fromkeys([*saved, *wanted]):
            lines += differences(saved.get(key), wanted.get(key), f"{name}.{key}" if name else str(key))
        return lines
    if isinstance(saved, (list, tuple)) and isinstance(wanted, (list, tuple)):
        saved, wanted = list(saved), list(wanted)
    return [] if saved == wanted else [f"{name}: {json.dumps(saved)} saved, {json.dumps(wanted)} now"]
