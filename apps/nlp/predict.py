"""Translations as a stream of lines, in the order in which the sentences came."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from apps.nlp.batch import TranslationBatch
from apps.nlp.subwords import Subwords

Translate = Callable[[TranslationBatch], Sequence[str]]
"""A batch to the translation of each of its sentences."""


def predict_lines(translate: Translate, subwords: Subwords, pairs: Sequence[str], data: Any) -> Iterator[str] | None:
    """Translations of what ``data`` was given to translate, a line for each of its lines; None: it was given nothing.

    Nothing is translated before the first line is asked for, and no more than is needed for the next one.

    Args:
        translate: the model.
        subwords, pairs: what it was trained with.
        data: a ``TranslationData``.

    Raises:
        ValueError: the data has other subwords or pairs.
    """
    if data.text is None and data.predict_file is None:
        return None
    if data.subwords.digest != subwords.digest:
        raise ValueError(f"the model's subwords are {subwords.digest}, and the data's are {data.subwords.digest}")
    if tuple(data.pairs) != tuple(pairs):
        raise ValueError(f"the model's pairs are {', '.join(pairs)}, and the data's are {', '.join(data.pairs)}")
    return in_order((batch.index_B.tolist(), translate(batch)) for batch in data.predict_dataloader())


def in_order(numbered: Iterable[tuple[Sequence[int], Sequence[str]]]) -> Iterator[str]:
    """Lines by their numbers from 0: as soon as a line and all before it are there.

    Raises:
        ValueError: a number comes twice, or is missing.
    """
    waiting: dict[int, str] = {}
    following = 0
    for numbers, texts in numbered:
        for number, text in zip(numbers, texts, strict=True):
            if number in waiting or number < following:
                raise ValueError(f"line {number + 1} comes twice")
            waiting[number] = text
        while following in waiting:
            yield waiting.pop(following)
            following += 1
    if waiting:
        raise ValueError(f"line {following + 1} is missing")
