"""Values of a configuration by the types of their places: read as a tree, written as plain values, made into objects.

The tree is read whole, its types checked and its defaults filled in, before anything of it is made.
"""

from __future__ import annotations

import dataclasses
import enum
import importlib
import inspect
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set as AbstractSet
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path, PurePath
from typing import Any

import yaml

from apps import registry
from apps.cli.classes import known_classes, load_class
from apps.cli.errors import UsageError, no_class, unknown_option
from apps.cli.flags import Word

_EMPTY = inspect.Parameter.empty
_PARTS = {"class_path", "init_args", "dict_kwargs"}
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")


class MissingError(UsageError):
    """An option without a default is not given."""


class _Unfit(Exception):
    """A value is of another kind than a place takes."""


@dataclass(frozen=True)
class Made:
    """An object that is still to be made.

    Attributes:
        kind: its class.
        arguments: those of the constructor, as ``read`` returns values.
        is_named: whether a plain value of its place names the class.
        further: arguments that the constructor does not name, from ``dict_kwargs``.
    """

    kind: Callable[..., Any]
    arguments: Mapping[str, Any]
    is_named: bool = True
    further: Mapping[str, Any] = field(default_factory=dict)


def read(value: Any, hint: Any, where: str, default: Any = None, without: Iterable[str] = ()) -> Any:
    """Return a value of a configuration as its place has it: numbers, texts, lists, mappings, and ``Made`` for objects.

    Args:
        value: the plain value; a ``Word`` may be YAML or a text.
        hint: type hint of its place.
        where: dotted name of its place, for messages.
        default: the place's default, which a mapping without a class changes.
        without: arguments of an object that are left out, since others give them.

    Raises:
        UsageError: naming the place: a value of another type, an option or a class that does not exist, or an option
            without default that is not given.
    """
    kinds, why = list(_kinds(hint)), ""
    loaded = _loaded(value) if isinstance(value, Word) else value
    for kind in sorted(kinds, key=_rank):
        try:
            own = str(value) if kind is str and isinstance(value, Word) else loaded
            return _read_as(kind, own, where, default, without)
        except _Unfit as unfit:
            why = why or str(unfit)
    if isinstance(value, str) and not isinstance(value, Word) and _loaded(value) != value:
        return read(Word(value), hint, where, default, without)  # numbers as texts, of YAML such as 1e-3
    if why:
        raise UsageError(why)
    if isinstance(value, Mapping) and any(map(_is_class, kinds)):
        base = next(kind for kind in kinds if _is_class(kind))
        raise UsageError(f"{where} has no class_path, which says what {base.__name__} it is")
    if isinstance(value, str) and len(named := [k for k in kinds if k is not type(None)]) == 1 and _is_class(named[0]):
        raise UsageError(f"{where}={value} is no {named[0].__name__}")
    names = list(dict.fromkeys(name for kind in kinds if kind is not type(None) for name in _names(kind)))
    raise UsageError(f"{where}={value} is not {'one of' if len(names) > 1 else 'of type'} {', '.join(names)}")


def arguments(kind: Any, given: Any, where: str, own: Mapping[str, Any], without: Iterable[str] = ()) -> dict[str, Any]:
    """Return all arguments of a constructor, read, with its defaults for those that are not given.

    Args:
        kind: the class or function.
        given: plain values by name.
        where: dotted name of the place of the object.
        own: defaults that replace the constructor's.
        without: names that are left out.

    Raises:
        UsageError: as ``read``.
    """
    if not isinstance(given, Mapping):
        raise UsageError(f"{where}={given} is no mapping of options of {kind.__name__}")
    without = {*without, *getattr(kind, "data_arguments", ())}  # a model has these from its data
    known = {name: (hint, own.get(name, default)) for name, (hint, default) in parameters(kind).items()}
    for name in given:
        if name not in known:
            raise UsageError(unknown_option(f"{where}.{name}", known, str(name), kind.__name__))
    missing = [n for n, (_, default) in known.items() if default is _EMPTY and n not in given and n not in without]
    if missing:
        raise MissingError(f"{where} needs {', '.join(missing)}, which has no default")
    out = {}
    for name, (hint, default) in known.items():
        if name in without:
            continue
        place = f"{where}.{name}"
        out[name] = read(given[name], hint, place, default) if name in given else _of_default(default, hint)
    return out


@cache
def parameters(kind: Any) -> dict[str, tuple[Any, Any]]:
    """Return type hint and default of each argument of a class, by name; without a default: ``Parameter.empty``."""
    if not dataclasses.is_dataclass(kind):
        from apps.cli.jsonargparse_internals import parameters_of

        return {p.name: (p.annotation, p.default) for p in parameters_of(kind)}
    hints, out = typing.get_type_hints(kind), {}
    for own in dataclasses.fields(kind):
        made = own.default_factory() if own.default_factory is not dataclasses.MISSING else own.default
        if own.init:
            out[own.name] = hints[own.name], _EMPTY if made is dataclasses.MISSING else made
    return out


def plain(value: Any) -> Any:
    """Return what ``read`` returned as plain values."""
    if isinstance(value, Made):
        values = {name: plain(item) for name, item in value.arguments.items()}
        if not value.is_named:
            return values
        further = {"dict_kwargs": dict(value.further)} if value.further else {}
        return {"class_path": path_of(value.kind), "init_args": values, **further}
    if isinstance(value, Mapping):
        return {name: plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(item) for item in value]
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, type) or (callable(value) and hasattr(value, "__qualname__")):
        return path_of(value)
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def make(value: Any) -> Any:
    """Return what ``read`` returned with its objects made, the inner ones first."""
    if isinstance(value, Made):
        return value.kind(**make(value.arguments), **value.further)
    if isinstance(value, Mapping):
        return {name: make(item) for name, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return type(value)(map(make, value))
    return value


def path_of(kind: Any) -> str:
    """Return the class path that a configuration has for a class: in the outermost package that offers it."""
    home, name = kind.__module__, kind.__name__
    if getattr(sys.modules.get(home), name, None) is not kind:
        name = kind.__qualname__
    if home.partition(".")[0] == "core":
        return f"core.{name}"
    if home.partition(".")[0] == "apps":
        return f"{home}.{name}"
    parents = (home.rsplit(".", n)[0] for n in range(home.count("."), 0, -1))
    offers = (package for package in parents if getattr(importlib.import_module(package), name, None) is kind)
    return f"{next(offers, home)}.{name}"


# ---- a value by the kind of its place


def _kinds(hint: Any) -> Iterator[Any]:
    """Yield the alternatives of a type hint, without annotations: those of a union, else the hint itself."""
    origin = typing.get_origin(hint)
    if origin in (types.UnionType, typing.Union):
        for part in typing.get_args(hint):
            yield from _kinds(part)
    elif origin is typing.Annotated:
        yield from _kinds(hint.__origin__)
    else:
        is_any = hint in (object, _EMPTY) or isinstance(hint, typing.TypeVar)
        yield Any if is_any else type(None) if hint is None else hint


def _rank(kind: Any) -> int:
    """Return the place of a kind in the order of reading: whole numbers before others, texts last."""
    order = [type(None), bool, int, float]
    return order.index(kind) if kind in order else 9 if kind is Any else 8 if kind is str else 5


def _is_class(kind: Any) -> bool:
    """Return whether the values of a kind are objects that a configuration names by class and arguments."""
    plain = (bool, int, float, complex, str, bytes, list, tuple, set, frozenset, dict, type(None), type)
    return isinstance(kind, type) and kind not in plain and not issubclass(kind, (PurePath, enum.Enum))


def _names(kind: Any) -> Iterator[str]:
    if typing.get_origin(kind) is typing.Literal:
        yield from map(str, typing.get_args(kind))
    else:
        is_class = isinstance(kind, type) and not typing.get_args(kind)
        yield kind.__name__ if is_class else re.sub(r"\b(?:\w+\.)+", "", str(kind))


def _loaded(text: str) -> Any:
    """Return a text as YAML, with numbers such as 1e-3; a text that is none is returned as it is."""
    if _NUMBER.fullmatch(text) and not text.lstrip("+-").isdigit():
        return float(text)
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return str(text)


def _read_as(kind: Any, value: Any, where: str, default: Any, without: Iterable[str]) -> Any:
    """Return ``value`` as a value of ``kind``; raises ``_Unfit`` if it is another kind of value."""
    origin, inner = typing.get_origin(kind) or kind, typing.get_args(kind)
    if kind is Any:
        return _read_any(value, where)
    if origin is typing.Literal:
        found = [choice for choice in inner if choice == value and type(choice) is type(value)]
        return found[0] if found else _unfit()
    if origin in (type, Callable):
        return _read_callable(kind, value, where)
    if not isinstance(origin, type):
        return _read_any(value, where)
    if origin in (type(None), bool, int, str):
        return value if type(value) is origin else _unfit()
    if origin is float:
        return float(value) if type(value) in (int, float) else _unfit()
    if issubclass(origin, enum.Enum):
        return origin[value] if value in origin.__members__ else value if isinstance(value, origin) else _unfit()
    if issubclass(origin, PurePath):
        return (Path if origin is PurePath else origin)(value) if isinstance(value, (str, PurePath)) else _unfit()
    if origin.__module__ in ("builtins", "collections", "collections.abc") and issubclass(origin, Iterable):
        return _read_collection(origin, inner, value, where)
    if isinstance(value, origin):
        return value
    return _read_object(origin, value, where, default, without)


def _unfit() -> Any:
    raise _Unfit


def _read_any(value: Any, where: str) -> Any:
    if isinstance(value, Mapping) and "class_path" in value and value.keys() <= _PARTS:
        return _read_object(object, value, where, None, ())
    if isinstance(value, Word):
        return _read_any(_loaded(value), where)
    if isinstance(value, Mapping):
        return {name: _read_any(item, f"{where}.{name}") for name, item in value.items()}
    return [_read_any(item, f"{where}.{i}") for i, item in enumerate(value)] if isinstance(value, list) else value


def _read_callable(kind: Any, value: Any, where: str) -> Any:
    """Return a class or a function by its path, or the object of a class to be called."""
    if callable(value):
        return value
    if isinstance(value, Mapping) and "class_path" in value and (typing.get_origin(kind) or kind) is not type:
        return _read_object(object, value, where, None, ())
    if not isinstance(value, str) or "." not in value:
        _unfit()
    found = load_class(value)
    if found is None:
        raise UsageError(no_class(where, value, known_classes(object)))
    base = next(iter(typing.get_args(kind)), object)
    wanted = base if isinstance(base, type) and (typing.get_origin(kind) or kind) is type else None
    return found if wanted is None or (isinstance(found, type) and issubclass(found, wanted)) else _unfit()


def _read_collection(origin: type, inner: Sequence[Any], value: Any, where: str) -> Any:
    if issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            _unfit()
        of_values = inner[1] if len(inner) == 2 else Any
        keys = next(iter(inner), Any)
        return {
            (name if keys in (Any, str) else read(name, keys, where)): read(v, of_values, f"{where}.{name}")
            for name, v in value.items()
        }
    if not isinstance(value, (list, tuple, set, frozenset)):
        _unfit()
    hints = [part for part in inner if part is not Ellipsis] or [Any]
    if issubclass(origin, tuple) and inner and Ellipsis not in inner and len(value) != len(inner):
        _unfit()
    fixed = issubclass(origin, tuple) and Ellipsis not in inner
    items = [read(item, hints[i if fixed and inner else 0], f"{where}.{i}") for i, item in enumerate(value)]
    if issubclass(origin, (tuple, set, frozenset)):
        return origin(items)
    return set(items) if issubclass(origin, AbstractSet) else items


def _read_object(base: type, value: Any, where: str, default: Any, without: Iterable[str]) -> Any:
    """Return the ``Made`` of a class that a text or a mapping names, or that its place or its default fixes."""
    is_fixed = dataclasses.is_dataclass(base) and not _is_open(base)
    given: Mapping[str, Any] = {}
    further: Mapping[str, Any] = {}
    if isinstance(value, str):
        if is_fixed or not value or value in ("true", "false"):
            _unfit()
        name = value
    elif isinstance(value, Mapping) and "class_path" in value:
        if extra := [key for key in value if key not in _PARTS]:
            raise UsageError(f"{where} has {str(extra[0])!r} beside class_path and init_args")
        name, given, further = value["class_path"], value.get("init_args") or {}, value.get("dict_kwargs") or {}
    elif isinstance(value, Mapping):
        name, given = None, value
    else:
        _unfit()
    own: Mapping[str, Any] = {}
    if name is None:
        held = default if isinstance(default, base) and dataclasses.is_dataclass(default) else None
        if held is None and not is_fixed:
            _unfit()
        kind = base if held is None else type(held)
        own = {} if held is None else {f.name: getattr(held, f.name) for f in dataclasses.fields(held) if f.init}
    else:
        kind = _class_named(str(name), base, where, is_text=isinstance(value, str))
    return Made(kind, arguments(kind, given, where, own, without), not is_fixed or kind is not base, further)


def _is_open(kind: type) -> bool:
    """Return whether a config's place takes several classes."""
    from core.registry import OpenConfig

    return issubclass(kind, OpenConfig)


def _registered(name: str) -> type:
    from core.registry import registered_config

    return registered_config(name)


def _class_named(name: str, base: type, where: str, is_text: bool) -> Any:
    """Return the class below ``base`` that a configuration names, imported if need be."""
    kind = None
    if _is_open(base) or dataclasses.is_dataclass(base) or name in registry.FORMER:
        try:
            if name.partition(".")[0] not in ("core", "apps"):
                load_class(name)
            kind = _registered(name)
        except ValueError:
            kind = None
    if kind is None and (path := registry.full_path(name)) is not None:
        kind = registry.resolve(path.rpartition(".")[2])
    if kind is None:
        kind = load_class(name) if "." in name else known_classes(base).get(name)
    if isinstance(kind, type) and issubclass(kind, base):
        return kind
    if kind is not None and (base is object or not isinstance(kind, type)):
        return kind if callable(kind) else _unfit()
    line = f"{where}={name} is no {base.__name__}" if kind is not None else no_class(where, name, known_classes(base))
    raise _Unfit(line) if is_text else UsageError(line)


def _of_default(default: Any, hint: Any) -> Any:
    """Return a default as ``read`` returns values, so that it is written out and made anew."""
    if isinstance(default, (list, tuple)):
        return type(default)(_of_default(item, Any) for item in default)
    if not dataclasses.is_dataclass(default) or isinstance(default, type):
        return default
    kind, own = type(default), {}
    for name, (of_field, _) in parameters(kind).items():
        own[name] = _of_default(getattr(default, name), of_field)
    return Made(kind, own, _is_open(kind) or kind not in _kinds(hint))
