"""Plain values as YAML with comments."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import yaml

_WIDTH = 118

Keys = tuple[str, ...]


def commented(value: Mapping[str, Any], beside: Mapping[Keys, str], above: Mapping[Keys, tuple[str, ...]]) -> str:
    """Return YAML of plain values.

    Args:
        value: sections by name.
        beside: a comment behind a value, by the keys that lead to it. An item of a list of texts is a key.
        above: comments on lines of their own before a value.
    """
    keys = {keys[:n] for keys in (*beside, *above) for n in range(len(keys))}  # what has a comment below it
    return "\n".join(_lines(value, (), beside, above, keys)) + "\n"


def _lines(
    value: Any, path: Keys, beside: Mapping[Keys, str], above: Mapping[Keys, tuple[str, ...]], open_keys: set[Keys]
) -> Iterator[str]:
    blank = "  " * len(path)
    for key, own in value.items():
        here = (*path, key)
        yield from (f"{blank}# {line}" for line in above.get(here, ()))
        flow = _flow(own)
        if isinstance(own, list) and here in open_keys:
            yield _with(f"{blank}{_flow(key)}:", beside.get(here))
            yield from (_with(f"{blank}  - {_flow(item)}", beside.get((*here, item))) for item in own)
        elif isinstance(own, Mapping) and own and (here in open_keys or not path or _is_long(flow, own)):
            yield _with(f"{blank}{_flow(key)}:", beside.get(here))
            yield from _lines(own, here, beside, above, open_keys)
        else:
            yield _with(f"{blank}{_flow(key)}: {flow}", beside.get(here))


def _is_long(flow: str, value: Mapping[str, Any]) -> bool:
    return len(flow) > 60 or "class_path" in value


def _flow(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=float("inf"), allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")


def _with(line: str, comment: str | None) -> str:
    if not comment:
        return line
    text = f"{line:<40} # {' '.join(comment.split())}"
    return text if len(text) <= _WIDTH else f"{text[: _WIDTH - 3]}..."
