"""Queries of SQLite files that can only read, and how a predicted query is judged by what it returns."""

from __future__ import annotations

import contextlib
import re
import sqlite3
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_LONGEST = 1_000_000
"""Bytes of a value at most, so that ``randomblob`` and ``replace`` do not fill the memory."""
_STEPS = 10_000
"""Instructions of SQLite's machine between two looks at the clock."""
_READS = (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION)
_QUOTED = re.compile(r"('(?:[^']|'')*'|\"(?:[^\"]|\"\")*\")")


@contextlib.contextmanager
def opened(database: str | Path) -> Iterator[sqlite3.Connection]:
    """Open an SQLite file so that nothing can be written, and close it after the block.

    Raises:
        ValueError: no such file, or a file that is not an SQLite database.
    """
    path = Path(database).expanduser()
    if not path.is_file():
        raise ValueError(f"database={str(database)!r} is not a file")
    with path.open("rb") as file:
        head = file.read(20)
    if head and not head.startswith(b"SQLite format 3\0"):
        raise ValueError(f"database={str(database)!r} is not an SQLite database")
    # Readers of a write-ahead log (version 2 in the header) make files next to it, unless nobody writes one now.
    is_still = head[18:19] == b"\2" and not path.with_name(f"{path.name}-wal").exists()
    address = f"{path.resolve().as_uri()}?mode=ro{'&immutable=1' if is_still else ''}"
    with contextlib.closing(sqlite3.connect(address, uri=True)) as connection:
        connection.text_factory = lambda data: data.decode(errors="replace")
        try:
            yield connection
        except sqlite3.Error as error:
            raise ValueError(f"database={str(database)!r} cannot be read: {error}") from error


def execute(database: str | Path, query: str, seconds: float = 5.0, rows: int = 100_000) -> list[tuple[Any, ...]]:
    """Return the rows of a query, which can only read tables and call functions without side effects.

    Args:
        database: an SQLite file, which stays as it is.
        query: one SELECT statement.
        seconds: time that the query may take.
        rows: of the answer at most.

    Raises:
        ValueError: no SQLite database; a query that is not SQL, names what is not there, would do more than read, or
            takes or returns more than it may.
    """
    denied: list[int] = []
    end = time.monotonic() + seconds

    def authorize(action: int, _: str | None, name: str | None, *__: str | None) -> int:
        if action in _READS and name != "load_extension":
            return sqlite3.SQLITE_OK
        denied.append(action)
        return sqlite3.SQLITE_DENY

    with opened(database) as connection:
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _LONGEST)
        connection.set_authorizer(authorize)
        connection.set_progress_handler(lambda: time.monotonic() > end, _STEPS)
        try:
            found = connection.execute(query).fetchmany(rows + 1)
        except (sqlite3.Error, sqlite3.Warning, ValueError) as error:
            late = f"took more than {seconds:g} s" if "interrupted" in str(error) else f"cannot be run: {error}"
            why = "would do more than read: only SELECT is allowed" if denied else late
            raise ValueError(f"query={query!r} {why}") from error
    if len(found) > rows:
        raise ValueError(f"query={query!r} returns more than {rows:,} rows")
    return found


def valid(prediction: str, row: Mapping[str, Any]) -> float:
    """Return 1.0 if the predicted query runs on the row's ``database``, else 0.0."""
    return float(_answer(prediction, row["database"]) is not None)


def execution_match(prediction: str, row: Mapping[str, Any]) -> float:
    """Return 1.0 if the predicted query returns what the row's first reference does on its ``database``, else 0.0.

    Rows are compared as a multiset, and in their order if the reference has ORDER BY. Real numbers are equal if nine
    digits are.

    Raises:
        ValueError: the reference itself cannot be run.
    """
    gold = row["references"][0]
    expected, answer = _rounded(execute(row["database"], gold)), _answer(prediction, row["database"])
    if answer is None or re.search(r"(?i)\border\s+by\b", _QUOTED.sub("", gold)):
        return float(answer == expected)
    return float(Counter(answer) == Counter(expected))


def query_match(prediction: str, row: Mapping[str, Any]) -> float:
    """Return 1.0 if the predicted query is the row's first reference, but for spaces and, outside quotes, case."""
    return float(_plain(prediction) == _plain(row["references"][0]))


def _answer(prediction: str, database: str) -> list[tuple[Any, ...]] | None:
    """Return the rows of a prediction; None if it is empty or cannot be run. The database itself must be readable."""
    with opened(database):
        try:
            return _rounded(execute(database, prediction)) if prediction.strip() else None
        except ValueError:
            return None


def _rounded(rows: list[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    return [tuple(float(f"{value:.9g}") if isinstance(value, float) else value for value in row) for row in rows]


def _plain(query: str) -> str:
    parts = _QUOTED.split(query.strip().rstrip(";"))
    parts[::2] = [re.sub(r"\s*(\W)\s*", r"\1", " ".join(part.lower().split())) for part in parts[::2]]
    return "".join(parts)
