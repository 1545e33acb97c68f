"""What a column of a user's table seems to hold, from its name and its values."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from apps.base.messages import excerpt
from apps.recsys.encoding.categories import as_list, is_list
from apps.recsys.encoding.numbers import is_text, plain
from apps.recsys.encoding.timestamps import to_seconds

Role = Literal["id", "category", "number", "count", "money", "date", "list", "text", "vector", "unused"]
TABLE_ROLES: dict[Role, str] = {
    "category": "categorical",
    "list": "multi_valued",
    "number": "continuous",
    "count": "continuous",
    "money": "continuous",
    "vector": "vectors",
    "date": "timestamps",
    "text": "texts",
}
"""The role of `TableConfig` for each guess; of ids and unused columns a model learns nothing."""

FEW_VALUES = 20
"""Integers of at most so many values are categories."""
SEPARATORS = ("|", ";", ",")
_LOOKED_AT = 20_000
_FIRST_SECOND, _LAST_SECOND = 946_684_800, 2_524_608_000  # numbers are times from 2000 to 2050
_DATE = r"^\d{1,4}[-/.]\d{1,2}[-/.]\d{1,4}(?:$|[ T])"
_NUMBER = r"^[-+]?[$€£]?\s?\d[\d,.' ]*(?:[eE][-+]?\d+)?\s?[%$€£]?$"
_ID = re.compile(r"(^|_)(id|ids|uuid|guid|key|code|nr|no|number|index|row)$")
_MONEY = {"price", "amount", "revenue", "cost", "spend", "spent", "paid", "salary", "income", "wage", "fee", "fare"}
_MONEY |= {"sales", "budget", "turnover", "usd", "eur", "gbp"}


@dataclass(frozen=True)
class Guess:
    """What a column seems to hold.

    Attributes:
        role: its role; "unused": nothing to learn from, or a form that is not read.
        reason: what in the column says so.
        separator: text between the values of a list in text; None: lists as JSON or of Arrow, or no lists.
        advice: what the user may do so that the column is of use; empty if nothing.
    """

    role: Role
    reason: str
    separator: str | None = None
    advice: str = ""


def guess(name: str, column: pa.ChunkedArray) -> Guess:
    """Return what a column seems to hold."""
    column = plain(column)
    kind = column.type
    known = column.drop_null()
    if is_text(kind):
        known = pc.utf8_trim_whitespace(known)
        known = known.filter(pc.not_equal(known, ""))
    if not len(known):
        return Guess("unused", "no value in any row")
    if is_list(kind):
        return _of_lists(known.slice(0, _LOOKED_AT).to_pylist(), "lists")
    if pa.types.is_binary(kind):
        return Guess("unused", "bytes that are no UTF-8 text", advice="save the file as UTF-8")
    if pa.types.is_nested(kind):
        return Guess("unused", f"values of type {kind}")
    distinct = pc.unique(known)
    if len(distinct) == 1:
        where = "every row" if len(known) == len(column) else "every row that has a value"
        return Guess("unused", f"{excerpt(_plain(distinct[0]), 30)} in {where}")
    if pa.types.is_date(kind) or pa.types.is_timestamp(kind):
        return _of_dates(name, known, "")
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        return _of_numbers(name, known, len(distinct))
    if is_text(kind):
        return _of_texts(name, known, distinct)
    if pa.types.is_boolean(kind) or pa.types.is_time(kind):
        return Guess("category", f"{len(distinct)} values, such as {distinct[0]}")
    return Guess("unused", f"values of type {kind}")


def _plain(value: Any) -> Any:
    own = value.as_py()
    return own if isinstance(own, (str, int, float, bool)) else str(own)


def _of_dates(name: str, known: pa.ChunkedArray, form: str) -> Guess:
    try:
        seconds = to_seconds(known, name, "the table")
    except ValueError:
        what = f"dates that are not read, such as {excerpt(_plain(known[0]), 30)}"
        return Guess("unused", what, advice="they are from 1950 to 2100, such as 2024-05-31")
    first, last = (str(np.datetime64(int(own), "s")) for own in (np.nanmin(seconds), np.nanmax(seconds)))
    return Guess(
        "date", form + f"{first.removesuffix('T00:00:00')} to {last.removesuffix('T00:00:00')}".replace("T", " ")
    )


def _of_lists(lists: Sequence[Sequence[Any]], what: str) -> Guess:
    """Return what lists are: vectors of one length, or values that recur."""
    flat = [value for own in lists for value in own]
    lengths = {len(own) for own in lists}
    if any(isinstance(value, (list, dict)) for value in flat):
        return Guess("unused", f"{what} of lists or of records")
    are_numbers = bool(flat) and all(isinstance(value, (int, float)) for value in flat)
    if len(lengths) == 1 and are_numbers and any(isinstance(value, float) for value in flat):
        return Guess("vector", f"{what} of {lengths.pop()} numbers")
    num_values = len(set(flat))
    if 2 * num_values > len(flat):
        return Guess("unused", f"{what} whose values do not recur")
    return Guess("list", f"{what} of {num_values:,} values, {len(flat) / len(lists):.1f} per row")


def _of_numbers(name: str, known: pa.ChunkedArray, num_values: int) -> Guess:
    number_n = np.asarray(known.cast(pa.float64(), safe=False))
    number_n = number_n[np.isfinite(number_n)]
    if not len(number_n):
        return Guess("unused", "no finite number in any row")
    low, high = float(number_n.min()), float(number_n.max())
    span = f"{low:,.10g} to {high:,.10g}"
    steps = np.diff(number_n)
    is_unique = num_values == len(number_n)
    is_named = _ID.search("_".join(words_of(name))) is not None
    is_money = not _MONEY.isdisjoint(words_of(name))
    if not is_named and (form := _epoch(number_n, low, high, is_count=bool((steps == 1).all()))):
        return _of_dates(name, known, f"{form}, ")
    if not (np.floor(number_n) == number_n).all():
        if is_money:
            cents = np.round(number_n, 2) == number_n
            return Guess("money", f"{span}{', two decimals' if cents.all() else ''}")
        return Guess("number", span)
    if is_unique and ((steps > 0).all() or (steps < 0).all()):
        return Guess("id", "it counts the rows")
    if is_named and num_values >= 0.95 * len(number_n):
        return Guess("id", "its name, and another value in nearly every row")
    if num_values <= FEW_VALUES or (is_named and 2 * num_values <= len(number_n)):
        return Guess("category", f"{num_values:,} integers, {span}")
    if is_money:
        return Guess("money", f"integers, {span}")
    return Guess("count" if low >= 0 else "number", f"integers, {span}")


def words_of(name: str) -> list[str]:
    """Return the words of a column's name in lower case, without digits: "userId" and "user_id2" are user, id."""
    return re.findall(r"[a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower())


def _epoch(number_n: np.ndarray, low: float, high: float, is_count: bool) -> str:
    """Return the form of numbers that are times; empty for other numbers."""
    for scale, unit in ((1, "seconds"), (1e3, "milliseconds"), (1e6, "microseconds"), (1e9, "nanoseconds")):
        if not is_count and low >= scale * _FIRST_SECOND and high < scale * _LAST_SECOND:
            return f"{unit} since 1970"
    if 19_500_101 <= low and high <= 21_001_231:
        column = pa.chunked_array([np.unique(number_n)])
        if (to_seconds(column, "", "") != np.asarray(column)).all():
            return "dates such as 20240531"
    return ""


def _of_texts(name: str, known: pa.ChunkedArray, distinct: pa.Array) -> Guess:
    texts = distinct.slice(0, _LOOKED_AT)
    example = excerpt(texts[0].as_py(), 40)
    lists = [own for own in map(as_list, texts.to_pylist()) if own is not None]
    rows = known.take(np.arange(0, len(known), -(-len(known) // _LOOKED_AT))).to_pylist()
    if 2 * len(lists) > len(texts):
        found = _of_lists([own for own in map(as_list, rows) if own is not None], "lists in text")
        return _of_listed_numbers(lists) or found
    dates = _share(texts, _DATE)
    if dates > 0.9:
        return _of_dates(name, known, "")
    numbers = _share(texts, _NUMBER)
    if numbers > 0.9 and len(distinct) > FEW_VALUES:
        odd = next((own for own in texts.to_pylist() if not re.search(_NUMBER, own)), None)
        if odd is not None and 10 * len(distinct) <= len(known):  # codes, of which some have letters
            return Guess("category", f"{len(distinct):,} texts, such as {example} and {excerpt(odd, 30)}")
        if odd is not None:
            return Guess(
                "unused", f"numbers, but also {excerpt(odd, 30)}", advice="leave fields without a number empty"
            )
        if re.search(r"[$€£%,' ]", texts[0].as_py()):
            return Guess("unused", f"numbers such as {example}", advice="write them as 1234.5")
    for separator in SEPARATORS:
        if (found_list := _cut(rows, separator)) is not None:
            return found_list
    if 2 * len(distinct) > len(known):
        words = np.mean([len(own.split()) for own in texts.to_pylist()])
        if words >= 3:
            return Guess("text", f"{words:.0f} words per row, such as {example}")
        share = len(distinct) / len(known)
        return Guess("id", "another value in every row" if share == 1 else f"{share:.0%} of the values differ")
    rows_each = len(known) / len(distinct)
    few = f", {rows_each:.1f} rows each" if rows_each < 10 else ""
    return Guess("category", f"{len(distinct):,} texts, such as {example}{few}")


def _of_listed_numbers(lists: Sequence[Sequence[str | None]]) -> Guess | None:
    """Return the guess for vectors in text; None for other lists."""
    are_numbers = all(re.search(_NUMBER, value or "") for value in lists[0])
    if len({len(own) for own in lists}) > 1 or not are_numbers or "." not in "".join(map(str, lists[0])):
        return None
    advice = "write a Parquet file, in which vectors are lists"
    return Guess("unused", f"vectors of {len(lists[0])} numbers in text", advice=advice)


def _share(texts: pa.Array, pattern: str) -> float:
    return float(np.mean(np.asarray(pc.match_substring_regex(texts, pattern))))


def _cut(rows: Sequence[str], separator: str) -> Guess | None:
    """Return the guess for lists between whose values a separator stands; None: there are none.

    A tenth of the rows has several values; the values recur, and are fewer than the texts that they make.
    """
    lists = [[part for own in row.split(separator) if (part := own.strip())] for row in rows]
    flat = [value for own in lists for value in own]
    distinct = set(flat)
    several = sum(len(own) > 1 for own in lists)
    if 10 * several < len(rows) or 2 * len(distinct) > len(flat) or len(distinct) >= len(set(rows)):
        return None
    if separator == "," and np.mean([len(value.split()) for value in distinct]) > 3:
        return None  # sentences
    return Guess(
        "list", f"{len(distinct):,} values between {separator!r}, {len(flat) / len(lists):.1f} per row", separator
    )
