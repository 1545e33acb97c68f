"""Context-free grammars: what a text may be, rule by rule."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from apps.nlp.decode.constraint import TextConstraint

_LONGEST = 1 << 16
"""Bytes of the shortest text of a rule at most."""
_STEPS = 1 << 16
"""Steps that a grammar keeps."""


class Ref(NamedTuple):
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


Symbol = bytes | frozenset[int] | Ref | Chars
"""The rest of a literal, the bytes of which one comes next, a rule, or a run."""
Stack = tuple[Symbol, ...]
"""What is to come, the next first."""

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
        self._start, self._shortest = Ref(start), dict[Symbol, bytes]()
        self._rules: dict[Symbol, list[Stack]] = {
            Ref(name): [tuple(_symbol(part, name, rules) for part in own if part != "") for own in alternatives]
            for name, alternatives in rules.items()
        }
        if start not in rules:
            raise ValueError(f"start={start!r} is not a rule")
        todo = list(self._rules)
        while todo:  # runs are rules too
            runs = {part for name in todo for own in self._rules[name] for part in own if isinstance(part, Chars)}
            todo = [run for run in runs if run not in self._rules]
            self._rules.update({run: _run(run) for run in runs})
        self._find_shortest()
        checked = set[Symbol]()
        for name in [*self._rules]:
            self._check_left(name, (), checked)
        self._moves = functools.lru_cache(_STEPS)(self._by_byte)

    def start(self) -> frozenset[Stack]:
        return self._heads([(self._start,)])

    def ends(self, state: frozenset[Stack]) -> bool:
        return () in state

    def shortest(self, state: frozenset[Stack]) -> bytes:
        return min(map(self._text, state), key=_order)

    def step(self, state: frozenset[Stack], byte: int) -> frozenset[Stack] | None:
        moves = self._moves(state)
        if isinstance(after := moves.get(byte), list):
            after = moves[byte] = self._heads(after)
        return after

    def _by_byte(self, state: frozenset[Stack]) -> dict[int, Any]:
        """Return what is left of the stacks that start with a byte, by byte; ``step`` replaces it by the state."""
        moves: dict[int, Any] = {}
        for head, *rest in filter(None, state):
            firsts: Any = head[:1] if isinstance(head, bytes) else head
            left = (head[1:], *rest) if isinstance(head, bytes) and len(head) > 1 else tuple(rest)
            for byte in firsts:
                moves.setdefault(byte, []).append(left)
        return moves

    def _heads(self, stacks: Iterable[Stack]) -> frozenset[Stack]:
        """Return the stacks with their first rules and runs replaced by what they may be."""
        todo, seen, found = list(stacks), set[Stack](), set[Stack]()
        while todo:
            stack = todo.pop()
            if stack in seen:
                continue
            seen.add(stack)
            if stack and stack[0] in self._rules:
                todo += [(*alternative, *stack[1:]) for alternative in self._rules[stack[0]]]
            else:
                found.add(stack)
        return frozenset(found)

    # ---- checks

    def _text(self, stack: Stack) -> bytes:
        """Return the shortest text of a stack; a ``KeyError`` says that a rule of it has none yet."""
        return b"".join(
            self._shortest[part] if part in self._rules
            else part if isinstance(part, bytes) else bytes((min(part),))  # type: ignore[arg-type]
            for part in stack
        )  # fmt: skip

    def _find_shortest(self) -> None:
        changed = True
        while changed:
            changed = False
            for name, alternatives in self._rules.items():
                for own in alternatives:
                    with contextlib.suppress(KeyError):
                        text = self._text(own)
                        if name not in self._shortest or _order(text) < _order(self._shortest[name]):
                            self._shortest[name], changed = text, True
                            if len(text) > _LONGEST:
                                raise ValueError(f"{name!r}: its shortest text has more than {_LONGEST:,} bytes")
        if endless := [name for name in self._rules if name not in self._shortest]:
            raise ValueError(f"{endless[0]!r} never ends: a grammar without an end")

    def _check_left(self, name: Symbol, above: Sequence[Symbol], checked: set[Symbol]) -> None:
        """Reject rules that can start with themselves, or with a rule above."""
        if name in above:
            raise ValueError(f"{name!r} can start with itself (left recursion)")
        for own in () if name in checked else self._rules[name]:
            for part in own:
                if isinstance(part, Ref):
                    self._check_left(part, [*above, name], checked)
                if self._text((part,)):
                    break
        checked.add(name)


class GrammarConstraint(TextConstraint):
    """The text is one of a ``Grammar``. Arguments are the grammar, and those of ``TextConstraint``."""


def _order(text: bytes) -> tuple[int, bytes]:
    return len(text), text


def _symbol(part: Any, name: str, rules: Mapping[str, Any]) -> Symbol:
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
    """Return the alternatives of a run."""
    if run.least == run.most == 1:
        return _one_of(run.chars, run.others)
    one = Chars(run.chars, 1, 1, run.others)
    rest = Chars(run.chars, 0, None if run.most is None else run.most - max(run.least, 1), run.others)
    if run.least:
        return [(*[one] * run.least, rest)]
    return [()] if run.most == 0 else [(), (one, rest)]
