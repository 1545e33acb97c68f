"""Translations as a stream of lines, in the order in which the sentences came."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from apps.nlp.batch import TranslationBatch
from apps.nlp.readers.lines import clean
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


def given_lines(text: Sequence[str] | str | None, predict_file: str | None) -> Iterator[str]:
    """The lines of a prediction as they come, each as `as_line` makes it.

    Args:
        text: a line, or several; None: those of the file.
        predict_file: its path, "-" being standard input.

    Raises:
        ValueError: a file that cannot be read, or a line that is not UTF-8.
    """
    if text is not None:
        yield from (as_line(line, i) for i, line in enumerate([text] if isinstance(text, str) else text))
    elif predict_file == "-":
        yield from _decoded(sys.stdin.buffer, "standard input")
    elif predict_file is not None:
        try:
            file = open(Path(predict_file).expanduser(), "rb")  # noqa: SIM115
        except OSError as error:
            raise ValueError(f"predict_file={predict_file!r} cannot be read: {error.strerror}") from error
        with file:
            yield from _decoded(file, predict_file)


def as_line(text: str, index: int) -> str:
    """A line of text, from 0, cleaned.

    Raises:
        ValueError: it is no text.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:  # bytes of a command line that are no text
        raise ValueError(f"line {index + 1} is not valid UTF-8") from error
    return clean(text)


def chunks(lines: Iterable[str], size: int) -> Iterator[list[str]]:
    """The lines cleaned, ``size`` at a time; those before one that is no text come before its error.

    Raises:
        ValueError: a line that is no text.
    """
    chunk: list[str] = []
    try:
        for index, line in enumerate(lines):
            chunk.append(as_line(line, index))
            if len(chunk) == size:
                yield chunk
                chunk = []
    except ValueError:
        if chunk:
            yield chunk
        raise
    if chunk:
        yield chunk


def _decoded(lines: Iterable[bytes], name: str) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        try:
            yield clean(line.decode("utf-8-sig" if number == 1 else "utf-8"))
        except UnicodeDecodeError as error:
            byte = line[error.start]
            raise ValueError(f"{name}, line {number}: byte 0x{byte:02x} is not valid UTF-8") from error


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
