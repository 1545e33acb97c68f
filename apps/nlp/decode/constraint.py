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
_KEPT = 1024
"""States of which a constraint keeps what may follow."""


class Constraint(Protocol):
    """Base of what the ids of a text may be. States are immutable and hashable, and never None; equal states allow the
    same texts."""

    def start(self) -> Hashable:
        """Return the state before the first id."""

    def allowed(self, state: Any) -> Tensor:
        """Return which ids may come next, bool (V,); ``EOS_ID`` if the text may end here."""

    def advance(self, state: Any, token_id: int) -> Hashable:
        """Return the state after an id that is allowed, and is not ``EOS_ID``."""

    def least(self, state: Any) -> int:
        """Return a number of ids with which the text can end. Some allowed id leads to a state of at least one fewer;
        0: it may end here."""

    def needs(self, state: Any) -> Tensor:
        """Return the ids that a text needs before its end after each next id, int32 (V,): -1 after ``EOS_ID``; if the
        id is not allowed, more than any text has."""
        allowed_V = self.allowed(state)
        need_V = torch.full(allowed_V.shape, _NEVER, dtype=torch.int32)
        for i in allowed_V.nonzero().flatten().tolist():
            need_V[i] = -1 if i == EOS_ID else self.least(self.advance(state, i))
        return need_V


class TextConstraint(Constraint):
    """The text that the ids spell by themselves is in a language, before ``Subwords.decode`` removes control characters
    and the spaces around it.

    Texts are read in bytes, so that characters that the vocabulary spells in bytes need nothing of their own. A state
    is that of the language, and whether the text is still empty: then a subword's leading space is not written.

    Args:
        language: the texts, read byte by byte. ``start()`` is its state before the first byte, ``steps(state)``
            the states after each byte with which a text continues; ``ends(state)`` says whether one may end, and
            ``shortest(state)`` is the rest of the shortest one, of equally short ones the first in byte order. States
            are immutable and hashable.
        subwords: the model's.
        side: whose subwords the model writes.
    """

    def __init__(self, language: Any, subwords: Subwords, side: Side = "target") -> None:
        self.language = language
        self.size, self._drops_again, *self._trees = _trees(subwords, side)
        self._after = functools.lru_cache(_KEPT)(self._walk)
        self._fewest = functools.lru_cache(_KEPT)(self._count)
        self.needs = functools.lru_cache(_KEPT)(self._needs)  # type: ignore[method-assign]

    def start(self) -> Hashable:
        return self.language.start(), True

    def allowed(self, state: Any) -> Tensor:
        return self.needs(state) < _NEVER

    def advance(self, state: Any, token_id: int) -> Hashable:
        states, place_V = self._after(state)
        return states[int(place_V[token_id])]

    def least(self, state: Any) -> int:
        return self._fewest(self.language.shortest(state[0]), state[1])

    def _needs(self, state: Any) -> Tensor:
        states, place_V = self._after(state)
        least = [min(self.least(own), _NEVER) for own in states]
        need_V = torch.tensor([*least, _NEVER], dtype=torch.int32)[place_V]
        need_V[EOS_ID] = -1 if self.language.ends(state[0]) else _NEVER
        return need_V

    def _walk(self, state: Any) -> tuple[list[Hashable], Tensor]:
        """Return the states after the ids that are allowed, and the place of each id's among them, int64 (V,); -1 after
        others. It is one walk over the tree of the subwords."""
        own, is_empty = state
        root = self._trees[is_empty]
        ids_of, todo = {(own, self._drops_again): [*root.get(-1, ())]}, [(root, own)]
        while todo:
            node, at = todo.pop()
            steps = self.language.steps(at)
            for byte in steps.keys() & node.keys() if len(steps) < len(node) else node:
                if (then := steps.get(byte)) is not None:
                    branch = node[byte]
                    if ids := branch.get(-1):
                        ids_of.setdefault((then, False), []).extend(ids)
                    if len(branch) > bool(ids):
                        todo.append((branch, then))
        place_V = torch.full((self.size,), -1)
        for place, ids in enumerate(ids_of.values()):
            place_V[ids] = place
        return [*ids_of], place_V

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


@functools.lru_cache(maxsize=8)
def _trees(subwords: Subwords, side: Side) -> tuple[int, bool, dict[int, Any], dict[int, Any]]:
    """Return V, whether a second "\u2581" at the start of a text is dropped too, and trees of the subwords by their
    bytes, with their ids at -1: within a text, and at its start."""
    surfaces, processor = subwords.surfaces(side), subwords.processor(side)
    spaced = {i for i, piece in enumerate(surfaces) if piece and piece[:1] == b" " and not processor.is_byte(i)}
    drops = any(not processor.decode([i]).startswith(" ") for i in spaced)
    drops_again = not processor.decode([i for i in spaced if surfaces[i] == b" "] * 2)
    trees: tuple[dict[int, Any], dict[int, Any]] = ({}, {})
    for i, piece in ((i, piece) for i, piece in enumerate(surfaces) if piece):
        for tree, own in zip(trees, (piece, piece[1:] if drops and i in spaced else piece), strict=True):
            functools.reduce(lambda node, byte: node.setdefault(byte, {}), own, tree).setdefault(-1, []).append(i)
    return len(surfaces), drops_again, *trees


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

    def steps(self, state: bytes) -> dict[int, bytes]:
        found, place = dict[int, bytes](), bisect_left(self.texts, state + b"\0")
        while place < len(self.texts) and self.texts[place].startswith(state):
            read = self.texts[place][: len(state) + 1]
            found[read[-1]], place = read, bisect_left(self.texts, read + b"\xff")  # no byte of UTF-8
        return found

    def ends(self, state: bytes) -> bool:
        return self.texts[bisect_left(self.texts, state)] == state

    def shortest(self, state: bytes) -> bytes:
        end = bisect_left(self.texts, state + b"\xff")  # no byte of UTF-8
        own = self.texts[bisect_left(self.texts, state) : end]
        return min(own, key=len)[len(state) :]
