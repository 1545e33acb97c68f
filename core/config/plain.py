"""The codec between configs and plain dicts, lists and numbers: what YAML, hyper-parameters and checkpoints hold.

A plain config is a dict of its fields. It names its class, ``{"class_path": ..., "init_args": {...}}``, if its place
allows several: the type hint there is an ``OpenConfig``, or is not the config's own class. A name is looked up among
the registered classes, so a loaded file only makes registered classes and imports nothing.
"""

from __future__ import annotations

import difflib
import inspect
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path, PurePath
from typing import Any

from ..registry import OpenConfig, is_registered, registered_config


def to_plain(value: Any, hint: Any = Any) -> Any:
    """Return a value as plain dicts, lists, numbers and texts.

    Args:
        value: a config, or mappings and sequences that may hold some.
        hint: type hint of the plain value's place, such as ``MoEConfig | None``.

    Raises:
        ValueError: a dataclass that is not registered: ``from_plain`` could not make it again.
    """
    if is_dataclass(value) and not isinstance(value, type):
        kind = type(value)
        if not is_registered(kind):
            raise ValueError(
                f"no checkpoint can be loaded with a {kind.__module__}.{kind.__qualname__}: decorate the class with "
                "core.register_config"
            )
        hints = typing.get_type_hints(kind)
        plain = {f.name: to_plain(getattr(value, f.name), hints[f.name]) for f in fields(value) if f.init}
        if kind in _kinds(hint) and not issubclass(kind, OpenConfig):
            return plain
        package = "core" if kind.__module__.partition(".")[0] == "core" else kind.__module__
        return {"class_path": f"{package}.{kind.__qualname__}", "init_args": plain}
    if isinstance(value, Mapping):
        return {str(name): to_plain(item, _of_values(hint)) for name, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [to_plain(item, _of_item(hint, i)) for i, item in enumerate(value)]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def from_plain(value: Any, hint: Any = Any, where: str = "") -> Any:
    """Return the value that ``to_plain`` made plain: configs from dicts, and tuples from lists if the hint says so.

    A config is returned as it is. Only registered classes are made, and the class that the hint names.

    Args:
        value: the plain value.
        hint: type hint of its place.
        where: dotted name of its place, for messages.

    Raises:
        ValueError: naming the place and the problem: a class that is not registered or not of the hint's kind, an
            unknown field, a value that its config rejects, or another kind of value than a config.
    """
    kinds = list(_kinds(hint))
    configs = tuple(k for k in kinds if isinstance(k, type) and (is_dataclass(k) or issubclass(k, OpenConfig)))
    if isinstance(value, Mapping) and "class_path" in value:
        return _of_class(value, configs, where)
    if isinstance(value, Mapping) and configs:
        if issubclass(configs[0], OpenConfig):
            raise ValueError(f"{where} has no class_path, which says what {configs[0].__name__} it is")
        return make(configs[0], value, where)
    if isinstance(value, Mapping):
        return {name: from_plain(item, _of_values(hint), _dotted(where, str(name))) for name, item in value.items()}
    if isinstance(value, str):
        _check_text(value, hint, where)
    elif configs and value is not None and not isinstance(value, configs) and set(kinds) <= {*configs, type(None)}:
        raise ValueError(f"{where}={_short(value)} is neither a {configs[0].__name__} nor a mapping of its options")
    if isinstance(value, (list, tuple, set, frozenset)):
        items = [from_plain(item, _of_item(hint, i), _dotted(where, str(i))) for i, item in enumerate(value)]
        return tuple(items) if isinstance(value, tuple) or _sequence(kinds) is tuple else items
    return value


def make(kind: type, arguments: Any, where: str = "") -> Any:
    """Return a config of class ``kind`` from its fields, as plain values or configs.

    Raises:
        ValueError: as ``from_plain``.
    """
    _check_mapping(kind, arguments, where)
    _check_names(kind, arguments, [f.name for f in fields(kind) if f.init], where)
    hints = typing.get_type_hints(kind)
    made = {name: from_plain(value, hints[name], _dotted(where, name)) for name, value in arguments.items()}
    try:
        return kind(**made)
    except TypeError as error:
        raise ValueError(f"{where}: {error}" if where else str(error)) from error


def arguments_from_plain(kind: type, arguments: Any, where: str) -> dict[str, Any]:
    """Return the arguments of a constructor, such as a module's, by the type hints there and in its base classes.

    Args:
        kind: the class.
        arguments: plain values by name; a name without a hint is taken for one of any kind.
        where: name of the class in messages, such as "model".

    Raises:
        ValueError: as ``from_plain``.
    """
    _check_mapping(kind, arguments, where)
    parameters = inspect.signature(kind).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        _check_names(kind, arguments, list(parameters), where)
    elif odd := [name for name in arguments if not str(name).isidentifier()]:  # a parser splits "a.b", and extends "a+"
        raise ValueError(f"{where} has {odd[0]!r}, which is no argument's name")
    hints = _constructor_hints(kind)
    return {name: from_plain(value, hints.get(name, Any), _dotted(where, name)) for name, value in arguments.items()}


def arguments_to_plain(kind: type, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a constructor as plain values, which ``arguments_from_plain`` reads.

    Raises:
        ValueError: as ``to_plain``.
    """
    hints = _constructor_hints(kind)
    return {name: to_plain(value, hints.get(name, Any)) for name, value in arguments.items()}


def _constructor_hints(kind: type) -> dict[str, Any]:
    hints: dict[str, Any] = {}
    for owner in reversed(kind.__mro__[:-1]):  # a subclass hands **kwargs on to its base
        if "__init__" in vars(owner):
            try:
                hints |= typing.get_type_hints(vars(owner)["__init__"])
            except NameError as error:
                raise ValueError(f"the type hints of {owner.__name__}.__init__ cannot be read: {error}") from None
    return hints


def _of_class(value: Mapping[str, Any], configs: tuple[type, ...], where: str) -> Any:
    """Return the config of ``{"class_path": ..., "init_args": ...}``, which has to be one of ``configs`` if any."""
    class_path, place = value["class_path"], f"{where}: " if where else ""
    if extra := set(value) - {"class_path", "init_args"}:
        raise ValueError(f"{where} has {sorted(map(str, extra))[0]!r} beside class_path and init_args")
    try:
        own = [k for k in configs if class_path in (k.__qualname__, f"{k.__module__}.{k.__qualname__}")]
        named = own[0] if own else registered_config(class_path)
    except ValueError as error:
        raise ValueError(f"{place}{error}") from None
    if configs and not issubclass(named, configs):
        raise ValueError(f"{place}class_path={class_path!r} is no {configs[0].__name__}")
    return make(named, value.get("init_args") or {}, where)


def _check_mapping(kind: type, arguments: Any, where: str) -> None:
    if not isinstance(arguments, Mapping):
        raise ValueError(f"{where or kind.__name__}={_short(arguments)} is not a mapping of {kind.__name__}'s options")


def _check_names(kind: type, arguments: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for name in arguments:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
            rest = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(sorted(known))}"
            raise ValueError(f"{f'{where}: ' if where else ''}{kind.__name__} has no field {name!r}; {rest}")


def _kinds(hint: Any) -> Iterator[Any]:
    """Yield the alternatives of a type hint: the parts of a union, else the hint itself."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        for part in typing.get_args(hint):
            yield from _kinds(part)
    else:
        yield hint


def _check_text(text: str, hint: Any, where: str) -> None:
    """Reject a text that a parser takes for a class to import, or for a file to read.

    Raises:
        ValueError: the hint has no text, and it or a part of it is a class, or a function; or it has both, and the text
            is not a plain word; or it may hold anything, and the text is YAML of nested values.
    """
    takes_text = any(k in (str, Any, object) or typing.get_origin(k) is typing.Literal for k in _kinds(hint))
    for kind in _classes(hint):
        # A list has no class to import except its items' classes; a Tensor iterates as well, and is a class.
        holds = issubclass(kind, Iterable) and kind.__module__ in ("builtins", "collections.abc")
        if holds or issubclass(kind, (str, int, float, PurePath, types.NoneType, types.UnionType)):
            continue
        if not takes_text:
            raise ValueError(f"{where}={_short(text)} is a text in place of a {kind.__name__}")
        is_word = re.fullmatch(r"[\w-]*", text) and not Path(text).is_file()
        # Every YAML text of a mapping or a list has one of these characters.
        if not is_word and (kind not in (Any, object) or re.search(r"[\[{]|:\s", text)):
            raise ValueError(f"{where}={_short(text)} may stand for a class or a file: it must be a plain word")


def _classes(hint: Any) -> Iterator[type]:
    """Yield every class that a hint names, in its arguments too."""
    kind = typing.get_origin(hint) or hint
    if isinstance(kind, type):
        yield kind
    if kind is not typing.Literal:
        for part in typing.get_args(hint):
            yield from _classes(part)


def _sequence(kinds: list[Any]) -> Any:
    """Return the class of the first sequence among ``kinds``, such as tuple; None if there is none."""
    origins = (typing.get_origin(k) or k for k in kinds)
    return next((o for o in origins if isinstance(o, type) and issubclass(o, Sequence) and o not in (str, bytes)), None)


def _of_values(hint: Any) -> Any:
    """Return the hint of a mapping's values."""
    for kind in _kinds(hint):
        origin, inner = typing.get_origin(kind), typing.get_args(kind)
        if isinstance(origin, type) and issubclass(origin, Mapping) and len(inner) == 2:
            return inner[1]
    return Any


def _of_item(hint: Any, i: int) -> Any:
    """Return the hint of a sequence's item number ``i``."""
    for kind in _kinds(hint):
        inner = [part for part in typing.get_args(kind) if part is not Ellipsis]
        if inner and _sequence([kind]) is not None:
            return inner[min(i, len(inner) - 1)]
    return Any


def _dotted(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
