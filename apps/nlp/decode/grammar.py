"""Context-free grammars: what a text may be, rule by rule."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from apps.nlp.decode.constraint import TextConstraint

_LONGEST = 1 << 16
"""Bytes of the shortest text of a rule at most."""
_STEPS = 1 << 12
"""States that a grammar keeps, and the steps from each."""


@dataclass(frozen=True)
class Ref:
    """The texts of a rule.

    Attributes:
        name: of the rule.
    """

    name: str

    def __repr__(self) -> str:
        return f"rule {self.name!r}"


@dataclass(frozen=True)
class Chars:
    """A run of characters.

    Attributes:
        chars: the characters it may have.
        least, most: of them; None: any number.
        others: it may have all characters but ``chars``, which are ASCII then, and control characters.

    Raises:
        ValueError: numbers that contradict each other, or ``others`` of characters beyond ASCII.
    """

    chars: str
    least: int = 1
    most: int | None = None
    others: bool = False

    def __post_init__(self) -> None:
        if self.others and not self.chars.isascii():
            raise ValueError(f"Chars({self.chars!r}, others=True): only ASCII characters can be left out")
        if self.least < 0 or (self.most is not None and self.most < self.least):
            raise ValueError(f"Chars: least={self.least}, most={self.most} is not a number of characters")


Stack = tuple[Any, ...]
"""What is to come, the next first: the rest of a literal (``bytes``), a byte of some (``frozenset``), or a rule's
number."""

_TAIL = range(0x80, 0xC0)
# Of a character beyond ASCII, without U+0080 to U+009F, which are control characters.
_BEYOND: list[Stack] = [
    tuple(frozenset(part) for part in parts)
    for parts in [
        ([0xC2], range(0xA0, 0xC0)), (range(0xC3, 0xE0), _TAIL),
        ([0xE0], range(0xA0, 0xC0), _TAIL), ([*range(0xE1, 0xED), 0xEE, 0xEF], _TAIL, _TAIL),
        ([0xED], range(0x80, 0xA0), _TAIL), ([0xF0], range(0x90, 0xC0), _TAIL, _TAIL),
        (range(0xF1, 0xF4), _TAIL, _TAIL, _TAIL), ([0xF4], range(0x80, 0x90), _TAIL, _TAIL),
    ]
]  # fmt: skip


class Grammar:
    """A context-free grammar. As a language, its state is the set of stacks of what may come, each starting with
    bytes. Alternatives are kept until they differ, so those with a long common start are better written as one.

    Args:
        rules: of each rule its alternatives, each a sequence of literals (``str``), rules (``Ref``) and runs
            (``Chars``).
        start: the rule of whole texts.

    Raises:
        ValueError: a rule that is missing, that never ends, whose shortest text has over 65,536 bytes, or that can
            start with itself (left recursion).

    Example::

        Grammar({"start": [["yes"], ["no, ", Ref("why")]], "why": [[Chars("abc ", most=20)]]})
    """

    def __init__(self, rules: Mapping[str, Sequence[Sequence[str | Ref | Chars]]], start: str = "start") -> None:
        if start not in rules:
            raise ValueError(f"start={start!r} is not a rule")
        known: dict[Ref | Chars, list[tuple[Any, ...]]] = {
            Ref(name): [tuple(_part(part, name, rules) for part in own if part != "") for own in alternatives]
            for name, alternatives in rules.items()
        }
        self._names = [*known]
        for name in self._names:  # runs are rules too: the list grows
            for run in (part for own in known[name] for part in own if isinstance(part, Chars) and part not in known):
                known[run] = _run(run)
                self._names.append(run)
        number = {name: i for i, name in enumerate(self._names)}
        self._rules = [[tuple(number.get(part, part) for part in own) for own in known[name]] for name in self._names]
        self._start, self._shortest, checked = number[Ref(start)], dict[int, bytes](), set[int]()
        self._find_shortest()
        for i in range(len(self._names)):
            self._check_left(i, (), checked)
        self._heads = functools.lru_cache(_STEPS)(self._closed)
        self._same = functools.lru_cache(_STEPS)(lambda state: state)  # equal states are one object: fast look-ups
        self.steps = functools.lru_cache(_STEPS)(self._steps)

    def start(self) -> frozenset[Stack]:
        return self._heads(((self._start,),))

    def ends(self, state: frozenset[Stack]) -> bool:
        return () in state

    def shortest(self, state: frozenset[Stack]) -> bytes:
        return min(map(self._text, state), key=_order)

    def _steps(self, state: frozenset[Stack]) -> dict[int, frozenset[Stack]]:
        """Return the state after each byte that may come."""
        moved: dict[int, tuple[Stack, ...]] = {}
        for head, *rest in filter(None, state):
            is_text = isinstance(head, bytes)
            then = (head[1:], *rest) if is_text and len(head) > 1 else tuple(rest)
            for byte in head[:1] if is_text else head:
                moved[byte] = (*moved.get(byte, ()), then)
        return {byte: self._heads(stacks) for byte, stacks in moved.items()}

    def _closed(self, stacks: tuple[Stack, ...]) -> frozenset[Stack]:
        """Return the stacks with their first rules replaced by what these may be."""
        todo, seen, found = list(stacks), set[Stack](), set[Stack]()
        while todo:
            stack = todo.pop()
            if stack and isinstance(stack[0], int) and stack not in seen:
                todo += [(*alternative, *stack[1:]) for alternative in self._rules[stack[0]]]
            elif stack not in seen:
                found.add(stack)
            seen.add(stack)
        return self._same(frozenset(found))

    # ---- checks

    def _text(self, stack: Stack) -> bytes:
        """Return the shortest text of a stack; a ``KeyError`` says that a rule of it has none yet."""
        return b"".join(
            self._shortest[part] if isinstance(part, int)
            else part if isinstance(part, bytes) else bytes((min(part),))
            for part in stack
        )  # fmt: skip

    def _find_shortest(self) -> None:
        changed = True
        while changed:
            changed = False
            for i, own in ((i, own) for i, alternatives in enumerate(self._rules) for own in alternatives):
                with contextlib.suppress(KeyError):
                    text = self._text(own)
                    if i not in self._shortest or _order(text) < _order(self._shortest[i]):
                        self._shortest[i], changed = text, True
                        if len(text) > _LONGEST:
                            raise ValueError(f"{self._names[i]}: its shortest text has more than {_LONGEST:,} bytes")
        for i, name in enumerate(self._names):
            if i not in self._shortest:
                raise ValueError(f"{name} never ends: a grammar without an end")

    def _check_left(self, number: int, above: Sequence[int], checked: set[int]) -> None:
        """Reject rules that can start with themselves, or with a rule above."""
        if number in above:
            raise ValueError(f"{self._names[number]} can start with itself (left recursion)")
        for own in () if number in checked else self._rules[number]:
            for part in own:
                if isinstance(part, int):
                    self._check_left(part, [*above, number], checked)
                if self._text((part,)):
                    break
        checked.add(number)


class GrammarConstraint(TextConstraint):
    """The text is one of a ``Grammar``. Arguments are the grammar, and those of ``TextConstraint``."""


def _order(text: bytes) -> tuple[int, bytes]:
    return len(text), text


def _part(part: Any, name: str, rules: Mapping[str, Any]) -> bytes | Ref | Chars:
    if isinstance(part, Ref) and part.name not in rules:
        raise ValueError(f"rule {name!r} refers to rule {part.name!r}, which does not exist")
    if not isinstance(part, str | Ref | Chars):
        raise ValueError(f"rule {name!r}: {part!r} is not a text, a Ref or Chars")
    return part.encode() if isinstance(part, str) else part


@functools.cache
def _one_of(chars: str, others: bool) -> list[Stack]:
    """Return the alternatives of one character."""
    if others:
        return [(frozenset(range(0x20, 0x7F)) - frozenset(chars.encode()),), *_BEYOND]
    ascii_bytes = frozenset(ord(char) for char in chars if char.isascii())
    beyond: list[Stack] = [(char.encode(),) for char in dict.fromkeys(chars) if not char.isascii()]
    return [*([(ascii_bytes,)] if ascii_bytes else []), *beyond]


def _run(run: Chars) -> list[Stack]:
    """Return the alternatives of a run, in bytes and other runs."""
    if run.most == 0 or run.least == run.most == 1:
        return _one_of(run.chars, run.others) if run.most else [()]
    one = Chars(run.chars, 1, 1, run.others)
    rest = Chars(run.chars, 0, None if run.most is None else run.most - max(run.least, 1), run.others)
    return [(*[one] * run.least, rest)] if run.least else [(), (one, rest)]
