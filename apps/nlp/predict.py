"""Lines of text that are given to a model, and its candidates for each, in the order of the lines."""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from apps.data.subwords import BOS_ID, EOS_ID, PAD_ID, Subwords
from apps.data.text_files import clean
from apps.nlp.decode import Candidate
from apps.nlp.text.batches import TranslationBatch, cut_by_tokens

log = logging.getLogger(__name__)

BadLines = Literal["error", "replace", "skip"]
"""How a line that is not UTF-8 is taken; see ``TranslationData``."""


class Line(NamedTuple):
    """A line of input and a model's candidates for it.

    Attributes:
        index: its number, from 0.
        source: the line.
        candidates: the model's candidates, best first; an empty line to be translated has only an empty text.
    """

    index: int  # type: ignore[assignment]  # a line has no use for tuple.index
    source: str
    candidates: list[Candidate]


def source_batches(
    lines: Iterable[str],
    subwords: Subwords,
    group: int,
    tag: str | None,
    max_length: int,
    tokens_per_batch: int,
    lines_at_once: int,
    start: int = 0,
) -> Iterator[tuple[TranslationBatch, list[str]]]:
    """Yield batches of sources, as the lines come, each with its lines.

    Each line is in one batch, whose ``index_B`` is the line's number from 0. An empty one has a source of ``EOS_ID``
    alone (``batch.empty_B``).

    Args:
        lines: text; line ends and spaces around it do not count.
        subwords: the model's.
        group: number of the language pair, or of the task.
        tag: name of the tag before each source; None: there is none.
        max_length: tokens of a source, specials included; a longer one is cut, with a warning that names its line.
        tokens_per_batch: maximum of sentences per batch times the longest sentence.
        lines_at_once: lines that are read and batched with their neighbors in length.
        start: lines before this one are passed over: a multiple of ``lines_at_once``, so that batches stay the same.

    Raises:
        ValueError: a line that is not text; those before it come first.
    """
    first = [] if tag is None else [subwords.tag_id(tag)]
    most = max_length - 1 - len(first)
    following = start
    for chunk in chunks(itertools.islice(lines, start, None), lines_at_once, start):
        index_N = np.arange(following, following + len(chunk))
        following += len(chunk)
        rows = subwords.encode(chunk, "source")
        for i, row in zip(index_N, rows, strict=True):
            if len(row) > most:
                message = "line %d has %d tokens: it is cut after %d (max_length=%d)"
                log.warning(message, i + 1, len(row), most, max_length)
        ids = [[*(first if row else []), *row[:most], EOS_ID] for row in rows]
        length_N = np.array([len(row) for row in ids])
        order = np.argsort(length_N, kind="stable")
        bounds = cut_by_tokens(length_N[order], tokens_per_batch)
        for at in (order[a:b] for a, b in itertools.pairwise(bounds)):
            batch = TranslationBatch(
                pad_sequence([torch.tensor(ids[i]) for i in at], batch_first=True, padding_value=PAD_ID),
                torch.full((len(at), 1), BOS_ID),
                torch.full((len(at),), group),
                torch.from_numpy(index_N[at]),
            )
            yield batch, [chunk[i] for i in at]


def given_lines(
    text: Sequence[str] | str | None, predict_file: str | None, bad_lines: BadLines = "error"
) -> Iterator[str]:
    """Yield the lines of a prediction as they come, each as `as_line` makes it.

    Args:
        text: a line, or several; None: the file's lines.
        predict_file: its path, "-" being standard input.
        bad_lines: handling of a line of the file that is not UTF-8.

    Raises:
        ValueError: a file that cannot be read, or a line that is not text.
    """
    if text is not None:
        yield from (as_line(line, i) for i, line in enumerate([text] if isinstance(text, str) else text))
    elif predict_file == "-":
        yield from _decoded(sys.stdin.buffer, "standard input", bad_lines)
    elif predict_file is not None:
        try:
            file = open(Path(predict_file).expanduser(), "rb")  # noqa: SIM115
        except OSError as error:
            raise ValueError(f"predict_file={predict_file!r} cannot be read: {error.strerror}") from error
        with file:
            yield from _decoded(file, predict_file, bad_lines)


def checked_texts(texts: Sequence[str]) -> list[str]:
    """Return the texts that a caller gives, each as `as_line` makes it.

    Raises:
        ValueError: one text instead of a list of them, or an item that is not text.
    """
    if isinstance(texts, (str, bytes)):
        raise ValueError(f"texts={texts[:40]!r} is one text, and not a list of texts: give [text]")
    for i, text in enumerate(texts := list(texts)):
        if not isinstance(text, str):
            raise ValueError(f"texts[{i}]={text!r} is a {type(text).__name__}, and not a text")
    return [as_line(text, i) for i, text in enumerate(texts)]


def as_line(text: str, index: int) -> str:
    """Return a line of text, cleaned; ``index`` is its number, from 0.

    Raises:
        ValueError: it is not text.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:  # bytes of a command line that are not text
        raise ValueError(f"line {index + 1} is not valid UTF-8") from error
    return clean(text)


def chunks(lines: Iterable[str], size: int, start: int = 0) -> Iterator[list[str]]:
    """Yield the lines cleaned, ``size`` at a time; those before one that is not text come before its error.

    Args:
        lines: text.
        size: of a chunk.
        start: number of the first line, for the error.

    Raises:
        ValueError: a line that is not text.
    """
    chunk: list[str] = []
    try:
        for index, line in enumerate(lines, start):
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


def _decoded(lines: Iterable[bytes], name: str, bad_lines: BadLines) -> Iterator[str]:
    number, bad = 0, list[int]()
    for number, line in enumerate(lines, 1):
        encoding = "utf-8-sig" if number == 1 else "utf-8"
        try:
            text = line.decode(encoding)
        except UnicodeDecodeError as error:
            if bad_lines == "error":
                raise ValueError(
                    f"{name}, line {number}: byte 0x{line[error.start]:02x} is not valid UTF-8; "
                    "bad_lines (--data.bad_lines replace, or skip) continues with the others"
                ) from error
            bad.append(number)
            text = "" if bad_lines == "skip" else line.decode(encoding, "replace")
        yield clean(text)
    if bad:
        shown = ", ".join(map(str, bad[:5])) + (", ..." if len(bad) > 5 else "")
        done = "are taken for empty ones" if bad_lines == "skip" else "have U+FFFD for each bad byte"
        log.warning(
            "%s: %s of %s lines are not valid UTF-8 and %s: line %s", name, f"{len(bad):,}", f"{number:,}", done, shown
        )


T = TypeVar("T")


def in_order(numbered: Iterable[tuple[Sequence[int], Sequence[T]]], start: int = 0) -> Iterator[T]:
    """Yield items by their numbers from ``start``, as soon as one and all before it are there.

    Raises:
        ValueError: a number comes twice, or is missing.
    """
    waiting: dict[int, T] = {}
    following = start
    for numbers, items in numbered:
        for number, item in zip(numbers, items, strict=True):
            if number in waiting or number < following:
                raise ValueError(f"line {number + 1} comes twice")
            waiting[number] = item
        while following in waiting:
            yield waiting.pop(following)
            following += 1
    if waiting:
        raise ValueError(f"line {following + 1} is missing")


def as_text(line: Line, num_return_sequences: int) -> list[str]:
    """Return a line's best candidate; of several, each after the line's number from 1 and its score, and tabs."""
    if num_return_sequences == 1:
        return [line.candidates[0].text]
    return [f"{line.index + 1}\t{score:.4f}\t{text}" for text, score in line.candidates]


def identity_of(data: Any) -> list[Any]:
    """Return which text is to be predicted: the file with its size and time, or a digest of the text."""
    if data.text is not None:
        return [hashlib.sha256(json.dumps(data.text).encode()).hexdigest()]
    path = Path(data.predict_file).expanduser()
    try:
        if data.predict_file == "-" or path.is_fifo():
            return ["-"]
        stat = path.stat()
    except OSError as error:
        raise ValueError(f"predict_file={data.predict_file!r} cannot be read: {error.strerror}") from error
    return [str(path.resolve()), stat.st_size, stat.st_mtime_ns]


def num_lines(data: Any) -> int | None:
    """Return the lines of ``data.text`` or of the file ``data.predict_file``; None if they cannot be counted."""
    if data.text is not None:
        return 1 if isinstance(data.text, str) else len(data.text)
    path = Path(data.predict_file).expanduser()
    if data.predict_file == "-" or not path.is_file():
        return None
    count, last = 0, b"\n"
    with open(path, "rb") as file:
        while piece := file.read(1 << 20):
            count, last = count + piece.count(b"\n"), piece
    return count + (not last.endswith(b"\n"))
