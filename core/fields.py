"""Types that say what a config's field may hold, and the check that reads them, with one line for a value and its rule.

Example::

    @dataclass(frozen=True)
    class Window(Checked):
        length: Count = 8
        shape: Annotated[str, OneOf("hann", "flat")] = "hann"

    Window(length=0)  # ValueError: length=0 is not at least 1
"""

from __future__ import annotations

import difflib
import functools
import math
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Annotated, Any, Literal


@dataclass(frozen=True)
class Bounds:
    """The range of a number.

    Attributes:
        low: lower bound.
        high: upper bound.
        ends: whether the bounds themselves are allowed, in the notation of intervals: "[]", "[)", "(]" or "()".
        why: reason, for the message.
    """

    low: float
    high: float = math.inf
    ends: str = "[)"
    why: str = ""

    def broken_by(self, value: Any) -> str:
        """Return the message for a value that breaks the rule; "" if it does not."""
        above = value > self.low if self.ends[0] == "(" else value >= self.low
        below = value < self.high if self.ends[1] == ")" else value <= self.high
        rule = "finite" if above and self.high == math.inf else str(self)
        return "" if above and below else f"is not {rule}{f': {self.why}' if self.why else ''}"

    def __str__(self) -> str:
        if self.high == math.inf:
            return f"{'above' if self.ends[0] == '(' else 'at least'} {self.low}"
        return f"in {self.ends[0]}{self.low}, {self.high}{self.ends[1]}"


class Length(Bounds):
    """The range of a sequence's length."""

    def broken_by(self, value: Any) -> str:
        broken = super().broken_by(len(value))
        return f"has length {len(value)}, which {broken}" if broken else ""


class OneOf:
    """A choice among names."""

    def __init__(self, *names: Any) -> None:
        self.names = names

    def broken_by(self, value: Any) -> str:
        """Return the message for a value that breaks the rule; "" if it does not."""
        if value in self.names:
            return ""
        near = difflib.get_close_matches(str(value).lower().replace("-", "_"), map(str, self.names), n=1, cutoff=0.5)
        return f"is not {self}{f'; did you mean {near[0]!r}?' if near else ''}"

    def __str__(self) -> str:
        return f"one of {', '.join(map(str, self.names))}"


Count = Annotated[int, Bounds(1)]
Depth = Annotated[int, Bounds(1, 1000, "[]")]
CountOrZero = Annotated[int, Bounds(0)]
Positive = Annotated[float, Bounds(0, ends="()")]
NotNegative = Annotated[float, Bounds(0)]
Share = Annotated[float, Bounds(0, 1, "[]")]
PositiveShare = Annotated[float, Bounds(0, 1, "(]")]
ShareBelowOne = Annotated[float, Bounds(0, 1)]


@dataclass(frozen=True)  # jsonargparse takes no other base for a dataclass whose class is not chosen
class Checked:
    """Base of the config dataclasses, whose values are checked against the types of their fields.

    A subclass with relations between fields checks them in a ``__post_init__`` that calls this one first.
    """

    prefix = ""  # not annotated: jsonargparse looks names of annotations up in the module of each subclass
    """Text before a field's name in messages, such as "balance."."""

    def __post_init__(self) -> None:
        check_fields(self, self.prefix)


def check_fields(config: Any, prefix: str = "") -> None:
    """Raise a ``ValueError`` if a field of a config is not what its type says; lists become tuples if it says so.

    Args:
        config: a dataclass.
        prefix: text before the name of the field in the message.
    """
    for name, hint in _hints(type(config)).items():  # type: ignore[arg-type]  # a class is hashable
        value = getattr(config, name)
        check_values(hint, **{f"{prefix}{name}": value})
        if isinstance(value, list) and any(_origin(part) is tuple for part in _parts(hint)):
            object.__setattr__(config, name, tuple(value))  # a list from YAML or a checkpoint


def check_values(hint: Any, **values: Any) -> None:
    """Raise a ``ValueError`` if a value does not match its type; the message has its name, the value and the rule.

    Args:
        hint: type, such as ``Count | None``.
        values: values by name.
    """
    for name, given in values.items():
        problem = _problem(hint, given)
        if problem is not None:
            place, value, rule = problem
            text = repr(value)
            raise ValueError(f"{name}{place}={text if len(text) <= 60 else f'{text[:57]}...'} {rule}")


@functools.cache
def _hints(kind: type) -> dict[str, Any]:
    hints = typing.get_type_hints(kind, include_extras=True)
    return {f.name: hints[f.name] for f in fields(kind) if f.init}  # type: ignore[arg-type]


def _origin(hint: Any) -> Any:
    """Return the class of a hint without its rules and parameters."""
    if typing.get_origin(hint) is Annotated:
        return _origin(typing.get_args(hint)[0])
    return typing.get_origin(hint) or hint


@functools.cache
def _parts(hint: Any) -> tuple[Any, ...]:
    """Return the alternatives of a type hint: the parts of a union, else the hint itself."""
    return typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)


_KINDS: dict[Any, tuple[str, Callable[[Any], bool]]] = {
    int: ("an integer", lambda value: isinstance(value, int) and not isinstance(value, bool)),
    float: ("a number", lambda value: isinstance(value, (int, float)) and not isinstance(value, bool)),
    str: ("text", lambda value: isinstance(value, str)),
    bool: ("True or False", lambda value: isinstance(value, bool)),
    types.NoneType: ("None", lambda value: value is None),
    tuple: ("a list", lambda value: isinstance(value, (tuple, list))),
    list: ("a list", lambda value: isinstance(value, (tuple, list))),
    dict: ("a mapping", lambda value: isinstance(value, Mapping)),
    Mapping: ("a mapping", lambda value: isinstance(value, Mapping)),
}


@functools.cache
def _kind(hint: Any) -> tuple[str, Callable[[Any], bool]]:
    """Return the words for a kind of value, and whether a value has it. Unknown kinds take all values."""
    kind = _origin(hint)
    if kind is Literal:
        names = typing.get_args(hint)
        return str(OneOf(*names)), lambda value: any(type(value) is type(name) for name in names)
    if isinstance(kind, type) and is_dataclass(kind):
        return f"of class {kind.__name__}", lambda value: isinstance(value, kind)
    return _KINDS.get(kind, ("", lambda value: True))


def _problem(hint: Any, value: Any) -> tuple[str, Any, str] | None:
    """Return the problem of a value: the place in it, the value there, and the rule; None if it is right."""
    if hint in _KINDS and _KINDS[hint][1](value):  # the fast path of long lists, such as a vocabulary
        return None
    parts = _parts(hint)
    of_kind = [part for part in parts if _kind(part)[1](value)]
    if not of_kind:
        return "", value, f"is not {' or '.join(dict.fromkeys(_kind(part)[0] for part in parts))}"
    problems = [next(_inner_problems(part, value), None) for part in of_kind]
    return None if None in problems else problems[0]


def _inner_problems(hint: Any, value: Any) -> Iterator[tuple[str, Any, str]]:
    """Yield the problems of a value that has the hint's kind."""
    kind, inner = typing.get_origin(hint), typing.get_args(hint)
    items: list[tuple[str, Any, Any]] = []
    if kind is Annotated:
        items = [("", inner[0], value)]
    elif kind is Literal and (rule := OneOf(*inner).broken_by(value)):
        yield "", value, rule
    elif kind is tuple and inner[-1] is not ... and len(inner) != len(value):
        yield "", value, f"has length {len(value)}, which is not {len(inner)}"
    elif kind in (tuple, list):
        items = [
            (f"[{i}]", inner[i] if kind is tuple and inner[-1] is not ... else inner[0], v) for i, v in enumerate(value)
        ]
    elif kind in (dict, Mapping):
        items = [(f"[{name!r}]", inner[1], item) for name, item in value.items()]
    for place, of_item, item in items:
        if (problem := _problem(of_item, item)) is not None:
            yield f"{place}{problem[0]}", *problem[1:]
    for rule in inner[1:] if kind is Annotated else ():
        if isinstance(rule, (Bounds, OneOf)) and (text := rule.broken_by(value)):
            yield "", value, text
