"""The verse-aligned Bible in an SQLite table ``bible(bbName, bNumber, cNumber, vNumber, vText)``, split by book."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Sequence
from pathlib import Path

from apps.data.text_files import AlignedText, clean

CODES = {"en": "4", "de": "e", "fr": "l", "es": "v", "it": "d", "ru": "r", "en_KJV": "k"}
"""The texts in the public domain: World English, Elberfelder 1932, Segond 1910, Reina-Valera 1909, Diodati, Synodal,
King James. The table holds others that are not."""

# Numbers of books that have no twin: the Gospels, Samuel, Kings, Chronicles, Ezra, Nehemiah, the letters to Ephesus and
# Colossae, 2 Peter and Jude retell each other, so none of them is held out.
VAL_BOOKS = {17: "Esther", 22: "Song of Songs", 29: "Joel", 30: "Amos", 35: "Habakkuk", 48: "Galatians", 60: "1 Peter"}
TEST_BOOKS = {8: "Ruth", 21: "Ecclesiastes", 27: "Daniel", 32: "Jonah", 50: "Philippians", 59: "James"}

_VERSES = 31_102
# Verse numbers of another count, the asterisks between parts of a psalm, brackets around words that the original lacks,
# soft hyphens; and the one verse that was filled in from another text.
_MARKS = re.compile(r"\(\d+:\d+[a-z]?\)|\(\*\)|\*( \*)*|[\[\]\xad]|\(ADDED FROM.*")


def read(path: Path, languages: Sequence[str]) -> dict[str, list[AlignedText]]:
    """Return the verses of each split, in the order of the books.

    Args:
        path: of the table.
        languages: keys of `CODES`.

    Raises:
        ValueError: no such table, or a text that is not complete.
    """
    query = "SELECT bNumber, vText FROM bible WHERE bbName = ? ORDER BY bNumber, cNumber, vNumber"
    if not path.is_file():
        raise ValueError(f"{path} is missing")
    try:
        connection = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro&immutable=1", uri=True)
        try:
            texts = {language: connection.execute(query, (CODES[language],)).fetchall() for language in languages}
        finally:
            connection.close()
    except sqlite3.Error as error:
        raise ValueError(f"{path} is not the table of verses: {error}") from error
    for language, verses in texts.items():
        if len(verses) != _VERSES:
            raise ValueError(f"{path} is truncated: {len(verses):,} verses in {language}, not {_VERSES:,}")
    splits: dict[str, list[AlignedText]] = {}
    for split, books in (("train", None), ("val", VAL_BOOKS), ("test", TEST_BOOKS)):
        text = {
            language: [_clean(verse) for book, verse in verses if _is_in(book, books)]
            for language, verses in texts.items()
        }
        splits[split] = [AlignedText(text, f"{path} ({split})")]
    return splits


def _is_in(book: int, books: dict[int, str] | None) -> bool:
    return book in books if books is not None else book not in VAL_BOOKS and book not in TEST_BOOKS


def _clean(verse: str) -> str:
    return " ".join(clean(_MARKS.sub("", verse)).split(" "))
