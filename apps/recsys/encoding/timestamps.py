"""Columns of timestamps, which become the hour of the day, the weekday and the time as a number of days.

All are in UTC. The derived columns are encoded as any others; hours and weekdays have the same rows in every table.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from apps.recsys.encoding.numbers import first_failing, is_text, known_text, plain, with_iso_dates
from apps.recsys.encoding.table_encoding import TimeRange
from apps.recsys.schema import timestamp_columns

HOURS = tuple(map(str, range(24)))
WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")

_FIRST_SECOND, _LAST_SECOND = -62_135_596_800, 253_402_300_799  # of the years 1 and 9999
_FIRST_DAY, _LAST_DAY = -7_305, 47_847  # of the years 1950 and 2101
_DAY = 86_400
_LEAST_OF_UNITS = (1e11, 1e14, 1e17)
"""Least milli-, micro- and nanoseconds, after 1973; in the unit before, each would be after the year 5000."""
_HAS_ZONE = r":\d\d(?:\.\d+)?\s*(?:[Zz]|[+-]\d\d(?::?\d\d)?)$"
_RULE = (
    "a timestamp is seconds to nanoseconds since 1970, a date, or text such as 2024-05-31 12:00:00, 31.05.2024, "
    "5/31/2024 or 20240531"
)


def with_parts(table: pa.Table, timestamps: Mapping[str, TimeRange], where: str, first_row: int = 0) -> pa.Table:
    """Return a table with the columns that each column of ``timestamps`` becomes next to its own.

    Args:
        table: the rows.
        timestamps: the columns, with ``known`` of ``to_seconds``.
        where: what to call the table in messages.
        first_row: number of the table's first row in messages, if it is a chunk of a longer one.

    Raises:
        ValueError: as for ``to_seconds``.
    """
    for column, known in timestamps.items():
        seconds_N = to_seconds(table.column(column), column, where, first_row, known)
        is_missing_N = np.isnan(seconds_N)
        whole_N = np.floor(np.where(is_missing_N, 0, seconds_N)).astype(np.int64)
        hour, weekday, days = timestamp_columns(column)
        for name, place_N, texts in (
            (hour, whole_N // 3600 % 24, HOURS),
            (weekday, (whole_N // _DAY + 3) % 7, WEEKDAYS),  # 1970 began on a Thursday
        ):
            places = pa.array(place_N.astype(np.int8), mask=is_missing_N)
            table = table.append_column(name, pa.DictionaryArray.from_arrays(places, pa.array(texts)))
        table = table.append_column(days, pa.array(seconds_N / _DAY))
    return table


def to_seconds(
    data: pa.ChunkedArray, column: str, where: str, first_row: int = 0, known: TimeRange = None
) -> NDArray[np.float64]:
    """Return timestamps as seconds since 1970, UTC, (N,), NaN if missing.

    Args:
        data: dates, times with a date, numbers as for ``seconds_of_numbers``, or text of numbers or of ISO 8601, also
            with the date as for ``with_iso_dates``, with a time without a zone in UTC.
        column, where: names of the column and the table in messages.
        first_row: number of the first row in messages.
        known: the times of training.

    Raises:
        ValueError: another type, or a value that is not a timestamp of the years 1 to 9999; the message names the
            first. Or most times are before 1950, after 2100 or within the first day of 1970, as years and Excel's
            numbers of days are, and are far from ``known``.
    """
    data = plain(data)
    kind = data.type
    if pa.types.is_date(kind) or pa.types.is_timestamp(kind):
        zone = kind.tz if pa.types.is_timestamp(kind) else None
        numbers = pc.divide(
            data.cast(pa.timestamp("us", zone), safe=False).cast(pa.int64()).cast(pa.float64(), safe=False), 1e6
        )
    elif is_text(kind):
        numbers = _of_text(data, column, where, first_row, known)
    elif pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind) or pa.types.is_null(kind):
        numbers = pa.array(seconds_of_numbers(data.cast(pa.float64(), safe=False), known))
    else:
        raise ValueError(f"column {column!r} of {where} holds values of type {kind}: {_RULE}")
    seconds_N = np.asarray(numbers.fill_null(np.nan), dtype=np.float64)
    days_N = seconds_N / _DAY
    bad_N, what = (seconds_N < _FIRST_SECOND) | (seconds_N > _LAST_SECOND), "outside the years 1 to 9999"
    odd_N = (days_N < _FIRST_DAY) | (days_N >= _LAST_DAY) | ((np.abs(days_N) < 1) & (days_N != 0))
    odd_N &= is_far(days_N, known)
    if not bad_N.any() and 2 * odd_N.sum() > (~np.isnan(days_N)).sum():
        moment = np.datetime64(int(seconds_N[np.argmax(odd_N)]), "s")
        bad_N, what = odd_N, f"which is read as {moment}, and most of its times are not from 1950 to 2100"
    if bad_N.any():
        row = int(np.argmax(bad_N))
        raise ValueError(
            f"column {column!r} of {where} holds {data[row].as_py()} in row {first_row + row}, {what}: {_RULE}, and not"
            " days or years"
        )
    return seconds_N


def is_far(days_N: NDArray[np.float64], known: TimeRange) -> NDArray[np.bool_]:
    """Return which times are outside the range of training by more than its length; all where it is not known."""
    first, last = known or (np.inf, -np.inf)
    return (days_N < 2 * first - last) | (days_N > 2 * last - first)


def seconds_of_numbers(numbers: Any, known: TimeRange = None) -> NDArray[np.float64]:
    """Return numbers (N,) as seconds since 1970, NaN if missing.

    Numbers such as 20240531 are dates where half of all can be. Others are seconds, or from 1e11, 1e14 and 1e17 on
    milli-, micro- and nanoseconds.

    Args:
        numbers: array of NumPy or Arrow.
        known: as for ``to_seconds``. Then each number that can be a date is one by itself, unless the seconds are near
            these times, and the date is not.
    """
    number_N = np.asarray(numbers, dtype=np.float64)
    seconds_N = number_N / 1000.0 ** sum(number_N >= least for least in _LEAST_OF_UNITS)
    has_eight_N = (number_N >= 19_500_101) & (number_N <= 21_001_231) & (number_N % 1 == 0)
    whole_n = number_N[has_eight_N].astype(np.int64)
    month_n = whole_n // 100 % 100 - 1
    first_n = (12 * (whole_n // 10_000 - 1970) + month_n).astype("M8[M]")
    date_n = first_n.astype("M8[D]") + (whole_n % 100 - 1)
    is_date_n = (month_n // 12 == 0) & (date_n.astype("M8[M]") == first_n)  # neither month 13 nor 31 February
    if known is None and 2 * is_date_n.sum() < (~np.isnan(number_N)).sum():
        return seconds_N
    days_N = np.full(number_N.shape, np.nan)
    days_N[has_eight_N] = np.where(is_date_n, date_n.astype(np.float64), np.nan)
    is_date_N = ~np.isnan(days_N) & (is_far(number_N / _DAY, known) | ~is_far(days_N, known))
    return np.where(is_date_N, days_N * _DAY, seconds_N)


def _of_text(data: pa.ChunkedArray, column: str, where: str, first_row: int, known: TimeRange) -> pa.ChunkedArray:
    text = known_text(data)
    distinct = pc.unique(text).drop_null()
    # The seconds of distinct texts, each in the way that its form asks for.
    iso = with_iso_dates(distinct)
    has_zone = pc.match_substring_regex(iso, _HAS_ZONE)
    is_number = pc.match_substring_regex(iso, r"^[+-]?\d+(?:\.\d*)?$")
    seconds_D = np.full(len(distinct), np.nan)
    failed = []
    for chosen, zone in ((is_number, None), (has_zone, "UTC"), (pc.invert(pc.or_(is_number, has_zone)), None)):
        own, place_d = iso.filter(chosen), np.flatnonzero(chosen)
        if not len(own):
            continue
        type_ = pa.float64() if chosen is is_number else pa.timestamp("us", zone)
        try:
            values = own.cast(type_)
        except pa.ArrowInvalid:
            failed.append(int(place_d[first_failing(own, type_)]))
            continue
        is_seconds = chosen is is_number
        seconds_D[place_d] = seconds_of_numbers(values, known) if is_seconds else np.asarray(values.cast("int64")) / 1e6
    if failed:
        odd = distinct[min(failed)]
        row = pc.index(text, odd).as_py()
        raise ValueError(f"column {column!r} of {where} holds {odd.as_py()!r} in row {first_row + row}: {_RULE}")
    return pa.chunked_array([pa.array(seconds_D, from_pandas=True)]).take(pc.index_in(text, distinct))
