"""Columns of timestamps, which become the hour of the day, the weekday and the time as a number of days.

All are in UTC. The derived columns are encoded as any others; hours and weekdays have the same rows in every table.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from apps.recsys.encoding.numbers import first_failing, is_text, plain, with_iso_dates
from apps.recsys.schema import timestamp_columns

HOURS = tuple(map(str, range(24)))
WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")

_FIRST_SECOND, _LAST_SECOND = -62_135_596_800, 253_402_300_799  # of the years 1 and 9999
_HAS_ZONE = r":\d\d(?:\.\d+)?\s*(?:[Zz]|[+-]\d\d(?::?\d\d)?)$"
_RULE = "a timestamp is seconds since 1970, a date, or text such as 2024-05-31 12:00:00"


def with_parts(table: pa.Table, timestamps: Sequence[str], where: str, first_row: int = 0) -> pa.Table:
    """Return a table with the columns that each column of ``timestamps`` becomes beside its own.

    Args:
        table: the rows.
        timestamps: names of columns.
        where: what to call the table in messages.
        first_row: number of the table's first row in messages, where it is a piece of a longer one.

    Raises:
        ValueError: a value is no timestamp; the message names the first one and its row.
    """
    for column in timestamps:
        seconds_N = to_seconds(table.column(column), column, where, first_row)
        is_missing_N = np.isnan(seconds_N)
        whole_N = np.floor(np.where(is_missing_N, 0, seconds_N)).astype(np.int64)
        hour, weekday, days = timestamp_columns(column)
        for name, place_N, texts in (
            (hour, whole_N // 3600 % 24, HOURS),
            (weekday, (whole_N // 86_400 + 3) % 7, WEEKDAYS),  # 1970 began on a Thursday
        ):
            places = pa.array(place_N.astype(np.int8), mask=is_missing_N)
            table = table.append_column(name, pa.DictionaryArray.from_arrays(places, pa.array(texts)))
        table = table.append_column(days, pa.array(seconds_N / 86_400))
    return table


def to_seconds(data: pa.ChunkedArray, column: str, where: str, first_row: int = 0) -> NDArray[np.float64]:
    """Return timestamps as seconds since 1970, UTC, (N,), NaN where missing.

    Args:
        data: dates, times with a date, numbers of seconds, or text of numbers or of ISO 8601, also with the date
            as 2024/05/31, where a time without a zone is UTC.
        column, where: names of the column and the table in messages.
        first_row: number of the first row in messages.

    Raises:
        ValueError: another type, or a value that is no timestamp of the years 1 to 9999; the message names the first.
    """
    data = plain(data)
    kind = data.type
    if pa.types.is_date(kind) or pa.types.is_timestamp(kind):
        zone = kind.tz if pa.types.is_timestamp(kind) else None
        numbers = pc.divide(data.cast(pa.timestamp("us", zone), safe=False).cast(pa.int64()).cast(pa.float64()), 1e6)
    elif is_text(kind):
        numbers = _of_text(data, column, where, first_row)
    elif pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind) or pa.types.is_null(kind):
        numbers = data.cast(pa.float64(), safe=False)
    else:
        raise ValueError(f"column {column!r} of {where} holds values of type {kind}: {_RULE}")
    seconds_N = np.asarray(numbers.fill_null(np.nan), dtype=np.float64)
    bad_N = (seconds_N < _FIRST_SECOND) | (seconds_N > _LAST_SECOND)
    if bad_N.any():
        row = int(np.argmax(bad_N))
        raise ValueError(
            f"column {column!r} of {where} holds {data[row].as_py()} in row {first_row + row}, outside the years 1 to "
            f"9999: {_RULE}, and not milliseconds"
        )
    return seconds_N


def _of_text(data: pa.ChunkedArray, column: str, where: str, first_row: int) -> pa.ChunkedArray:
    text = pc.utf8_trim_whitespace(data)
    distinct = pc.unique(pc.if_else(pc.equal(text, ""), pa.scalar(None, text.type), text)).drop_null()
    # The seconds of distinct texts, each in the way that its form asks for.
    iso = with_iso_dates(distinct)
    has_zone = pc.match_substring_regex(iso, _HAS_ZONE)
    is_number = pc.match_substring_regex(iso, r"^[+-]?\d+(?:\.\d*)?$")
    seconds_D = np.full(len(distinct), np.nan)
    failed = []
    for chosen, zone in ((is_number, None), (has_zone, "UTC"), (pc.invert(pc.or_(is_number, has_zone)), None)):
        own, place_d = iso.filter(chosen), np.flatnonzero(chosen)
        type_ = pa.float64() if chosen is is_number else pa.timestamp("us", zone)
        try:
            values = own.cast(type_)
        except pa.ArrowInvalid:
            failed.append(int(place_d[first_failing(own, type_)]))
            continue
        seconds_D[place_d] = values if chosen is is_number else np.asarray(values.cast(pa.int64())) / 1e6
    if failed:
        odd = distinct[min(failed)]
        row = pc.index(text, odd).as_py()
        raise ValueError(f"column {column!r} of {where} holds {odd.as_py()!r} in row {first_row + row}: {_RULE}")
    return pa.chunked_array([pa.array(seconds_D, from_pandas=True)]).take(pc.index_in(text, distinct))
