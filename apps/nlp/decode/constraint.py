"""Which ids may follow those that are written, so that a text comes out as it must be."""

from __future__ import annotations

import functools
from bisect import bisect_left
from collections.abc import Hashable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from apps.data.subwords import EOS_ID, Side, Subwords
from apps.data.text_files import clean

_NEVER = 1 << 30
"""Ids of a text that the subwords cannot spell, or after an id that is not allowed."""
_WALKS = 1024
"""States of which a constraint keeps what may follow."""


class Constraint(Protocol):
    """What the ids of a text may be. States are immutable and hashable; equal states allow the same texts."""

    def start(self) -> Hashable:
        """Return the state before the first id."""

    def allowed(self, state: Any) -> Tensor:
        """Return which ids may come next, bool (V,); ``EOS_ID`` if the text may end here."""

    def advance(self, state: Any, token_id: int) -> Hashable:
        """Return the state after an id that is allowed, and is not ``EOS_ID``."""

    def least(self, state: Any) -> int:
        """Return a number of ids with which the text can end. Some allowed id leads to a state of at least one fewer;
        0: it may end here."""


def needs(constraint: Constraint, state: Any) -> Tensor:
    """Return the ids that a text needs before its end after each next id, int32 (V,): -1 after ``EOS_ID``; if the id is
    not allowed, more than any text has."""
    allowed_V = constraint.allowed(state)
    need_V = torch.full(allowed_V.shape, _NEVER, dtype=torch.int32)
    ids = [i for i in allowed_V.nonzero().flatten().tolist() if i != EOS_ID]
    least = [constraint.least(constraint.advance(state, i)) for i in ids]
    need_V[ids] = torch.tensor(least, dtype=torch.int32)
    if allowed_V[EOS_ID]:
        need_V[EOS_ID] = -1
    return need_V


class TextConstraint(Constraint):
    """The text that the ids spell by themselves is in a language, before ``Subwords.decode`` removes control characters
    and the spaces around it.

    Texts are read in bytes, so that characters that the vocabulary spells in bytes need nothing of their own. A state
    is that of the language, and whether the text is still empty: then a subword's leading space is not written.

    Args:
        language: the texts, read byte by byte. ``start()`` is its state before the first byte, ``step(state, byte)``
            the one after a byte, None if no text continues so; ``ends(state)`` says whether a text may end, and
            ``shortest(state)`` is the rest of the shortest one, of equally short ones the first in byte order. States
            are immutable and hashable.
        subwords: the model's.
        side: whose subwords the model writes.
    """

    def __init__(self, language: Any, subwords: Subwords, side: Side = "target") -> None:
        self.language = language
        self.size, self._trees, self._drops_again = _trees(subwords, side)
        self._after = functools.lru_cache(_WALKS)(self._walk)
        self._fewest = functools.lru_cache(_WALKS)(self._count)

    def start(self) -> Hashable:
        return self.language.start(), True

    def allowed(self, state: Any) -> Tensor:
        allowed_V = torch.zeros(self.size, dtype=torch.bool)
        allowed_V[list(self._after(state))] = True
        allowed_V[EOS_ID] = self.language.ends(state[0])
        return allowed_V

    def advance(self, state: Any, token_id: int) -> Hashable:
        return self._after(state)[token_id]

    def least(self, state: Any) -> int:
        return self._fewest(self.language.shortest(state[0]), state[1])

    def _walk(self, state: Any) -> dict[int, Hashable]:
        """Return the state after each id that is allowed, by one walk over the tree of the subwords."""
        own, is_empty = state
        root = self._trees[is_empty]
        after: dict[int, Hashable] = dict.fromkeys(root.get(-1, ()), (own, self._drops_again))
        todo = [(root, own)]
        while todo:
            node, at = todo.pop()
            for byte, branch in node.items():
                if byte >= 0 and (then := self.language.step(at, byte)) is not None:
                    after.update(dict.fromkeys(branch.get(-1, ()), (then, False)))
                    todo.append((branch, then))
        return after

    def _count(self, text: bytes, is_empty: bool) -> int:
        """Return the fewest ids that spell a text."""
        least = [*[_NEVER] * len(text), 0]
        for begin in reversed(range(len(text))):
            node: Any = self._trees[is_empty and begin == 0]
            for end in range(begin, len(text)):
                if (node := node.get(text[end])) is None:
                    break
                if -1 in node:
                    least[begin] = min(least[begin], least[end + 1] + 1)
        return least[0]


class TrieConstraint(TextConstraint):
    """The text is one of some given ones.

    Args:
        texts: the texts.
        subwords, side: as in ``TextConstraint``.

    Raises:
        ValueError: there is no text.
    """

    def __init__(self, texts: Sequence[str], subwords: Subwords, side: Side = "target") -> None:
        super().__init__(Texts(texts), subwords, side)


class Texts:
    """Some texts as a language; a state is what has been read.

    Args:
        texts: the texts, which are cleaned as those that are written.

    Raises:
        ValueError: there is none.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        self.texts = sorted({clean(text).encode() for text in texts})
        if not self.texts:
            raise ValueError("texts=[]: a constraint needs one text at least")

    def start(self) -> bytes:
        return b""

    def step(self, state: bytes, byte: int) -> bytes | None:
        read = state + bytes((byte,))
        place = bisect_left(self.texts, read)
        return read if place < len(self.texts) and self.texts[place].startswith(read) else None

    def ends(self, state: bytes) -> bool:
        return self.texts[bisect_left(self.texts, state)] == state

    def shortest(self, state: bytes) -> bytes:
        end = bisect_left(self.texts, state + b"\xff")  # no byte of UTF-8
        own = self.texts[bisect_left(self.texts, state) : end]
        return min(own, key=len)[len(state) :]


@functools.lru_cache(maxsize=4)
def _trees(subwords: Subwords, side: Side) -> tuple[int, tuple[dict[int, Any], dict[int, Any]], bool]:
    """Return the number of ids; trees of the subwords by their bytes, with their ids at -1, within a text and at its
    start; and whether a text of spaces is empty."""
    surfaces, decode = subwords.surfaces(side), subwords.processor(side).decode
    spaced = next((i for i, piece in enumerate(surfaces) if piece and piece[:1] == b" "), None)
    drops = spaced is not None and not decode([spaced]).startswith(" ")
    space = surfaces.index(b" ") if b" " in surfaces else None
    trees: tuple[dict[int, Any], dict[int, Any]] = ({}, {})
    for i, piece in ((i, piece) for i, piece in enumerate(surfaces) if piece):
        first = piece[1:] if drops and piece[:1] == b" " else piece
        for tree, own in zip(trees, (piece, first), strict=True):
            functools.reduce(lambda node, byte: node.setdefault(byte, {}), own, tree).setdefault(-1, []).append(i)
    return len(surfaces), trees, space is not None and not decode([space, space])
