"""Text in columns: one row a line, the languages side by side with tabs between them. Also inside a zip archive."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from apps.data.text_files import AlignedText, clean, expand, text_lines, zipped_lines

log = logging.getLogger(__name__)

SKIP = "-"
"""Stands for a column that holds no text."""


def find(root: Path, names: str) -> list[Path]:
    """Return the files of a name or pattern.

    Raises:
        ValueError: there is none.
    """
    paths = expand(root, names)
    if not paths:
        raise ValueError(f"{root / names} is missing")
    return paths


def read(paths: Sequence[Path], columns: Sequence[str], named: bool = True) -> AlignedText:
    """Return the rows of all files, ``.tsv`` or ``.txt``, plain, compressed or in a ``.zip``, one after the other.

    An empty line is a row without text. A first line in which every language is a column of its own is a header, not a
    row. A quote is a character like another.

    A row of more columns than the layout has is left out, with a warning that counts them: which of its columns are
    text is not known. A file of which most rows are so is rejected.

    Args:
        paths: the files.
        columns: the language of each column, ``-`` if it has none. A last ``-`` may lack.
        named: the user said so; else a header may name the columns, in another order or among others.

    Raises:
        ValueError: a file that cannot be read, a line with fewer columns, a file whose rows have more, or a header that
            contradicts ``columns``.
    """
    languages = [language for language in columns if language != SKIP]
    text: dict[str, list[str]] = {language: [] for language in languages}
    left_out: Counter[str] = Counter()
    for name, lines in (part for path in paths for part in _parts(path)):
        layout, empty, rows = list(columns), 0, 0
        wider: Counter[int] = Counter()
        for number, line in enumerate(lines, 1):
            fields = line.rstrip("\r").split("\t")
            if number == 1 and set(languages) <= set(fields):
                layout = _header(fields, layout, languages, name, named)
                continue
            rows += 1
            if fields == [""]:
                empty += 1
                fields *= len(layout)
            least = max(i for i, language in enumerate(layout, 1) if language != SKIP)
            if len(fields) < least:
                raise ValueError(f"{name}, line {number}: {len(fields)} columns, not {least} ({', '.join(layout)})")
            while len(fields) > len(layout) and not clean(fields[-1]):  # a tab at the end of a line
                fields.pop()
            if len(fields) > len(layout):
                wider[len(fields)] += 1
                continue
            for i, language in enumerate(layout):
                if language != SKIP:
                    text[language].append(clean(fields[i]))
        _check_wider(name, wider, rows, layout)
        for count, num_rows in wider.items():
            left_out[f"of {count} columns where {len(layout)} are expected"] += num_rows
        if empty:
            log.info("%s: %s of %s lines are empty", name, f"{empty:,}", f"{rows:,}")
    return AlignedText(text, str(paths[0]), left_out)


def _header(
    fields: Sequence[str], columns: Sequence[str], languages: Sequence[str], name: str, named: bool
) -> list[str]:
    """Return the layout of a file whose first line names the languages.

    Raises:
        ValueError: the user named another order, or it names a language twice.
    """
    layout = [field if field in languages else SKIP for field in fields]
    if len([field for field in layout if field != SKIP]) > len(languages):
        raise ValueError(f"{name}, line 1: the header names a language twice: {', '.join(fields)}")
    if named and [layout.index(language) for language in languages] != [columns.index(lang) for lang in languages]:
        raise ValueError(
            f"{name}, line 1: the header says {', '.join(fields)}, and columns={list(columns)}: columns "
            f"(--data.columns) must be [{', '.join(layout)}], or be left out"
        )
    return layout


def _check_wider(name: str, wider: Counter[int], rows: int, columns: Sequence[str]) -> None:
    """Warn of rows with more columns than the layout.

    Raises:
        ValueError: most rows are so: the columns must be named.
    """
    if not wider:
        return
    (usual, most), *_ = wider.most_common(1)
    if 2 * wider.total() > rows:
        example = ", ".join([*columns, *['"-"'] * (usual - len(columns))])
        raise ValueError(
            f"{name}: {most:,} of {rows:,} rows have {usual} columns where {len(columns)} are expected "
            f'({", ".join(columns)}): say which languages they are with columns (--data.columns), "-" for one '
            f"that is none, such as [{example}]"
        )
    for count, num_rows in sorted(wider.items()):
        share, layout = f"{num_rows:,} of {rows:,} rows", f"{len(columns)} are expected ({', '.join(columns)})"
        log.warning("%s: %s have %d columns where %s: skipped", name, share, count, layout)


def _parts(path: Path) -> Iterator[tuple[str, Iterator[str]]]:
    if path.suffix == ".zip":
        yield from zipped_lines(path)
    else:
        yield str(path), text_lines(path)
