"""Subwords as parts of words, to be shown."""

from __future__ import annotations

import re
from collections.abc import Iterable

_BEGIN = "\N{LOWER ONE EIGHTH BLOCK}"  # sentencepiece's sign for the space before a word
_SPECIAL = re.compile(r"<(?!0x)[^<>]+>")


def words_of(pieces: Iterable[str]) -> list[tuple[str, ...]]:
    """Return subwords in sentencepiece's spelling as parts of words, without the sign that starts a word.

    A tag, and the start or the end of a sentence, is a word of its own.

    Example::

        words_of(["▁Per", "son", "</s>"])     # [("Per", "son"), ("</s>",)]
    """
    words: list[tuple[str, ...]] = []
    open_word = False
    for piece in pieces:
        special = _SPECIAL.fullmatch(piece) is not None
        text = piece.removeprefix(_BEGIN) or _BEGIN
        if open_word and not special and not piece.startswith(_BEGIN):
            words[-1] = (*words[-1], text)
        else:
            words.append((text,))
        open_word = not special
    return words
