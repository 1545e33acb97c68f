"""Text in columns: one row a line, the languages side by side with tabs between them. Also inside a zip archive."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

from apps.nlp.readers.lines import Rows, clean, decode, expand, read_bytes, read_zip

log = logging.getLogger(__name__)

SKIP = "-"
"""Stands for a column that holds no text."""


def find(root: Path, names: str) -> list[Path]:
    """The files of a name or pattern.

    Raises:
        ValueError: there is none.
    """
    paths = expand(root, names)
    if not paths:
        raise ValueError(f"{root / names} is missing")
    return paths


def read(paths: Sequence[Path], columns: Sequence[str]) -> Rows:
    """The rows of all files, ``.tsv`` or ``.txt``, plain, ``.gz`` or in a ``.zip``, one after the other.

    An empty line is a row without text.

    Args:
        paths: the files.
        columns: the language of each column, ``-`` where it has none; further columns are not read. A first line of
            just these names is no row. A quote is a character like another.

    Raises:
        ValueError: a file that cannot be read, or a line with fewer columns.
    """
    wanted = {language: i for i, language in enumerate(columns) if language != SKIP}
    text: dict[str, list[str]] = {language: [] for language in wanted}
    for name, data in (part for path in paths for part in _parts(path)):
        lines = decode(data, name).split("\n")
        if lines[-1] in ("", "\r"):  # what follows the last line end
            lines.pop()
        empty = 0
        for number, line in enumerate(lines, 1):
            fields = line.rstrip("\r").split("\t")
            if fields == [""]:
                empty += 1
                fields *= len(columns)
            if len(fields) < len(columns):
                raise ValueError(
                    f"{name}, line {number}: {len(fields)} columns, not {len(columns)} ({', '.join(columns)})"
                )
            if number == 1 and fields[: len(columns)] == list(columns):
                continue
            for language, i in wanted.items():
                text[language].append(clean(fields[i]))
        if empty:
            log.info("%s: %s of %s lines are empty", name, f"{empty:,}", f"{len(lines):,}")
    return Rows(text, str(paths[0]))


def _parts(path: Path) -> Iterator[tuple[str, bytes]]:
    if path.suffix == ".zip":
        yield from read_zip(path)
    else:
        yield str(path), read_bytes(path)
