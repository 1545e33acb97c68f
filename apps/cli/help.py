"""``--help_all`` and ``--model.help``, which print every option in a line, with its default and its meaning."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import shutil
import textwrap
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import Strategy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from apps.cli.classes import app_classes, known_classes, load_class, long_name, named_class_path
from apps.cli.errors import UsageError, unknown_option
from apps.cli.flags import given
from apps.cli.jsonargparse_internals import parameters_of
from apps.cli.request import Request
from apps.cli.sections import TRAINER_DEFAULTS
from apps.registry import class_path, full_path, short
from core.fields import OneOf
from core.registry import OpenConfig

SECTIONS = ("run", "trainer", "model", "data")
_OF_TRAINER = (Callback, Logger, Strategy, Optimizer, LRScheduler)
_LONGEST = 48
"""Length of a name in characters, beyond which its line is not aligned with the others."""


class Option(NamedTuple):
    """An option of the command line.

    Attributes:
        name: dotted name.
        default: default in YAML, with the kind of value if the default does not show it.
        meaning: first sentence about it.
    """

    name: str
    default: str
    meaning: str


def show(request: Request) -> bool:
    """Print the help that a command line asks for; returns whether it asks for one of ours.

    Raises:
        UsageError: a section or a class does not exist.
    """
    for name, value in given(request.flags):
        if name == "help_all":
            if value not in (None, *SECTIONS):
                raise UsageError(unknown_option(f"help_all={value}", SECTIONS, value))
            for section in SECTIONS if value is None else (value,):
                path = named_class_path(section, request.config)
                _print(_title(section, path), _section(section, request))
            return True
        part = name.removesuffix(".help")
        if part != name and value is None and part not in ("model", "data"):
            raise UsageError(f"{name} needs the name of a class")
        if part != name:
            value = long_name(part, value) if value and part in ("optimizer", "lr_scheduler") else value
            path = _path(value) if value else named_class_path(part, request.config)
            _print(_title(part, path), _classes(part) if path is None else _of_class(path, part))
            return True
    return False


def _title(part: str, path: str | None) -> str:
    return part if path is None else f"{part} {path}: {_first(inspect.getdoc(_load(path)) or '')}"


def _section(section: str, request: Request) -> Iterable[Option]:
    if section == "run":
        own = request.options.described()
        return [Option(name, _plain(value) if value else "", meaning) for name, value, meaning in own]
    if section == "trainer":
        return options_of(Trainer, "trainer", TRAINER_DEFAULTS)
    path = named_class_path(section, request.config)
    return _classes(section) if path is None else _of_class(path, section)


def _classes(part: str) -> Iterator[Option]:
    for name, path in app_classes(part).items():
        kind = _load(path)
        yield Option(f"{part} {name}", "", _first(inspect.getdoc(kind) or ""))
    yield Option(f"{part}.help CLASS", "", "the options of one of them, or of a class of yours")


def _of_class(path: str, prefix: str) -> Iterator[Option]:
    kind = _load(path)
    stand_ins = getattr(kind, "defaults_of_none", None)
    yield from options_of(kind, prefix, stand_ins({}) if stand_ins else None)


def _load(path: str) -> type[Any]:
    kind = load_class(path)
    if kind is None:
        raise UsageError(unknown_option(path, [*app_classes("model"), *app_classes("data")], short(path)))
    if not isinstance(kind, type):
        raise UsageError(f"{path} is not a class")
    return kind


def _path(name: str) -> str:
    """Return the class path of a model, data module, config, such as a router's, or part of a trainer, by its name."""
    known = {name: kind for base in (*_OF_TRAINER, OpenConfig) for name, kind in known_classes(base).items()}
    return full_path(name) or (class_path(known[name]) if name in known else name)


def options_of(kind: type[Any], prefix: str, defaults: Mapping[str, Any] | None = None) -> Iterator[Option]:
    """Yield the options of a class's constructor, and below them the options of the configs that it takes.

    Args:
        kind: the class.
        prefix: first words of their names.
        defaults: values that replace the constructor's.
    """
    linked = getattr(kind, "data_arguments", ())
    with_rules = typing.get_type_hints(kind, include_extras=True) if dataclasses.is_dataclass(kind) else {}
    for parameter in parameters_of(kind):
        name, hint = parameter.name, with_rules.get(parameter.name, parameter.annotation)
        if name in linked:
            continue
        default = (defaults or {}).get(name, parameter.default)
        nested = next((k for k in _kinds(hint) if isinstance(k, type) and dataclasses.is_dataclass(k)), None)
        yield Option(f"{prefix}.{name}", _default(default, hint, nested), _first(parameter.doc or ""))
        if nested is None:
            continue
        own = default if dataclasses.is_dataclass(default) and not isinstance(default, type) else None
        if own is not None or not issubclass(nested, OpenConfig):
            values = {f.name: getattr(own, f.name) for f in dataclasses.fields(own) if f.init} if own else None
            yield from options_of(nested if own is None else type(own), f"{prefix}.{name}", values)


def _first(text: str) -> str:
    """Return the first sentence, on one line and without markup."""
    paragraph = " ".join(text.strip().partition("\n\n")[0].split())
    plain = re.sub(r":\w+:`([^`]*)`|`+([^`]*)`+", lambda m: m[1] or m[2], paragraph)
    return re.split(r"(?<=[a-z)\"'0-9])\.\s+(?=[A-Z])", plain, maxsplit=1)[0].rstrip(".")


def _kinds(hint: Any) -> tuple[Any, ...]:
    origin = typing.get_origin(hint)
    if origin in (types.UnionType, typing.Union):
        return tuple(k for arg in typing.get_args(hint) for k in _kinds(arg) if k is not type(None))
    return (hint,)


def _default(value: Any, hint: Any, nested: type[Any] | None) -> str:
    if value is inspect.Parameter.empty:
        return f"required ({_kind(hint)})"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return type(value).__name__
    if nested is not None:
        return f"null ({nested.__name__})"
    if value is None or any(typing.get_origin(k) in (typing.Literal, typing.Annotated) for k in _kinds(hint)):
        return f"{_plain(value)} ({_kind(hint)})"
    return _plain(value)


def _plain(value: Any) -> str:
    try:
        return json.dumps(value) if not isinstance(value, str) else value or '""'
    except TypeError:
        return str(value)


def _kind(hint: Any) -> str:
    names = []
    for kind in _kinds(hint):
        if typing.get_origin(kind) is typing.Literal:
            names += [str(choice) for choice in typing.get_args(kind)]
        elif typing.get_origin(kind) is typing.Annotated:  # of ``core.fields``
            rule = kind.__metadata__[0]
            names += map(str, rule.names if isinstance(rule, OneOf) else [rule])
        else:
            names.append(getattr(kind, "__name__", str(kind)) if not typing.get_args(kind) else str(kind))
    return ", ".join(dict.fromkeys(re.sub(r"\b(?:\w+\.)+", "", name) for name in names))


def _print(title: str, options: Iterable[Option]) -> None:
    """Print the options below each other, a line each, cut at the edge of the terminal."""
    rows = [Option(f"  --{o.name}", o.default, o.meaning) for o in options]
    rows = [o._replace(default=textwrap.shorten(o.default, _LONGEST, placeholder="...")) for o in rows]
    edge = max(shutil.get_terminal_size((160, 24)).columns, 80)
    left = max((len(o.name) for o in rows if len(o.name) <= _LONGEST), default=0)
    middle = max((len(o.default) for o in rows if len(o.default) <= 24), default=0)
    print(title)
    for name, default, meaning in rows:
        start = f"{name:<{left}}  {default:<{middle}}  "
        room = max(edge - len(start), 16)
        print((start + textwrap.shorten(meaning, room, placeholder="...")).rstrip())
    print()
