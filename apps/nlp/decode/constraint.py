"""Which ids may follow those that are written, so that a text comes out as it must be."""

from __future__ import annotations

import functools
from abc import abstractmethod
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

    @abstractmethod
    def start(self) -> Hashable:
        """Return the state before the first id."""

    @abstractmethod
    def allowed(self, state: Any) -> Tensor:
        """Return which ids may come next, bool (V,); ``EOS_ID`` if the text may end here."""

    @abstractmethod
    def advance(self, state: Any, token_id: int) -> Hashable:
        """Return the state after an id that is allowed, and is not ``EOS_ID``."""

    @abstractmethod
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


class Language(Protocol):
    """A set of texts, read byte by byte in UTF-8. States are immutable and hashable."""

    def start(self) -> Any:
        """Return the state before the first byte."""

    def step(self, state: Any, byte: int) -> Any:
        """Return the state after a byte; None: no text continues so."""

    def ends(self, state: Any) -> bool:
        """Return whether a text may end here."""

    def shortest(self, state: Any) -> bytes:
        """Return the rest of the shortest text; of equally short ones, the first in byte order."""


class TextConstraint(Constraint):
    """The text that the ids spell by themselves is in a language, before ``Subwords.decode`` removes control characters
    and the spaces around it.

    Texts are read in bytes, so that characters that the vocabulary spells in bytes need nothing of their own. A state is
    that of the language, and whether the text is still empty: then a subword's leading space is not written.

    Args:
        language: the texts.
        subwords: the model's.
        side: whose subwords the model writes.
    """

    def __init__(self, language: Language, subwords: Subwords, side: Side = "target") -> None:
        self.language = language
        self.size, self._within, self._first, self._drops_again = _trees(subwords, side)
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
        root = self._first if is_empty else self._within
        after: dict[int, Hashable] = dict.fromkeys(root[0], (own, self._drops_again))
        todo = [(root, own)]
        while todo:
            (_, branches), at = todo.pop()
            for byte, branch in branches.items():
                if (then := self.language.step(at, byte)) is not None:
                    after.update(dict.fromkeys(branch[0], (then, False)))
                    todo.append((branch, then))
        return after

    def _count(self, text: bytes, is_empty: bool) -> int:
        """Return the fewest ids that spell a text."""
        least = [*[_NEVER] * len(text), 0]
        for begin in reversed(range(len(text))):
            node: Any = self._first if is_empty and begin == 0 else self._within
            for end in range(begin, len(text)):
                if (node := node[1].get(text[end])) is None:
                    break
                if node[0]:
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
    """Some texts as a ``Language``; a state is what has been read.

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
def _trees(subwords: Subwords, side: Side) -> tuple[int, Any, Any, bool]:
    """Return the number of ids; the tree of what they write within a text and of what at its start; and whether a text
    of spaces is empty."""
    surfaces, decode = subwords.surfaces(side), subwords.processor(side).decode
    spaced = next((i for i, piece in enumerate(surfaces) if piece and piece[:1] == b" "), None)
    drops = spaced is not None and not decode([spaced]).startswith(" ")
    space = surfaces.index(b" ") if b" " in surfaces else None
    within, first = _branch(), _branch()
    for i, piece in enumerate(surfaces):
        if piece:
            _insert(within, piece, i)
            _insert(first, piece[1:] if drops and piece[:1] == b" " else piece, i)
    return len(surfaces), within, first, space is not None and not decode([space, space])


def _branch() -> tuple[list[int], dict[int, Any]]:
    """Return a node of a tree: the ids that end there, and the nodes after it by their byte."""
    return [], {}


def _insert(root: tuple[list[int], dict[int, Any]], piece: bytes, token_id: int) -> None:
    node = root
    for byte in piece:
        node = node[1].setdefault(byte, _branch())
    node[0].append(token_id)
