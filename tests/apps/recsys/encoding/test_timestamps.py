"""Timestamps of every form as seconds, hours, weekdays and days."""

import datetime as dt
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pytest
from refusals import refused

from apps.recsys.encoding.timestamps import to_seconds, with_parts

# 2024-05-31 13:30:15, a Friday.
SECONDS = 1_717_162_215
MIDNIGHT = SECONDS - (13 * 3600 + 30 * 60 + 15)


def seconds(values, kind=None, known=None):
    column = pa.chunked_array([pa.array(values, kind)])
    return to_seconds(column, "time", "the training table", known=known).tolist()


@pytest.mark.parametrize(
    ("values", "kind"),
    [([SECONDS], pa.int64()), ([float(SECONDS)], pa.float64()), ([Decimal(SECONDS)], None), ([str(SECONDS)], None),
     ([str(SECONDS)], pa.string_view()), ([dt.datetime(2024, 5, 31, 13, 30, 15)], pa.timestamp("s")),
     ([dt.datetime(2024, 5, 31, 13, 30, 15)], pa.timestamp("ns")),
     ([dt.datetime(2024, 5, 31, 11, 30, 15, tzinfo=dt.timezone(-dt.timedelta(hours=2)))], None),
     (["2024-05-31 13:30:15"], None), (["2024/05/31 13:30:15"], None), (["31.05.2024 13:30:15"], None),
     (["31.5.2024 13:30:15"], None), (["5/31/2024 13:30:15"], None), (["05/31/2024 13:30:15"], None),
     (["2024/5/31 13:30:15"], None), (["2024-5-31T13:30:15"], None), (["31.5.2024 15:30:15+02:00"], None),
     (["2024-05-31 13:30:15 UTC"], None), ([1000 * SECONDS], pa.int64()), ([str(1000 * SECONDS)], None),
     ([SECONDS, 1000 * SECONDS], None), ([10**6 * SECONDS, 10**9 * SECONDS], None), ([" 2024-05-31T13:30:15Z"], None),
     (["2024-05-31T15:30:15+02:00"], None), (["2024-05-31 15:30:15.000+0200"], None),
     (["2024-05-31 15:30:15"], pa.timestamp("us", "Europe/Berlin"))],
)  # fmt: skip
def test_one_moment_in_many_forms(values, kind):
    if kind == pa.timestamp("us", "Europe/Berlin"):  # it says 15:30 there at 13:30 UTC
        values = [dt.datetime(2024, 5, 31, 13, 30, 15, tzinfo=dt.UTC)]
    assert seconds(values, kind) == [SECONDS] * len(values)


def test_dates_and_mixed_texts_and_the_parts_of_a_timestamp():
    assert seconds([dt.date(2024, 5, 31)], pa.date32()) == [MIDNIGHT]
    # 2999 has more microseconds than a float has integers; 402 years have 146,827 days.
    assert (
        seconds([dt.date(2024, 1, 1), dt.date(2024, 1, 2), dt.date(2426, 1, 1)])[2] == 1_704_067_200 + 146_828 * 86_400
    )
    mixed = ["2024-05-31", "", str(SECONDS), None, "2024-05-31 13:30", "2024-05-31T13:30:15.250Z", "2024-05-31"]
    nan = float("nan")
    expected = [MIDNIGHT, nan, SECONDS, nan, SECONDS - 15, SECONDS + 0.25, MIDNIGHT]
    np.testing.assert_array_equal(seconds(mixed), expected)
    np.testing.assert_array_equal(seconds(pa.array(mixed).dictionary_encode()), expected)
    assert np.isnan(seconds([None])).all()
    np.testing.assert_array_equal(seconds(["NA", "2024-05-31", "?"]), [nan, MIDNIGHT, nan])
    assert seconds(["1.6.2024 9:05", "6/1/2024 9:05"]) == [MIDNIGHT + 86_400 + 9 * 3600 + 300] * 2
    # 1970-01-01 00:00 was a Thursday; a second before it, Wednesday at 23.
    table = with_parts(pa.table({"t": pa.array([0, -1, SECONDS, None])}), {"t": None}, "the rows")
    assert table.column_names == ["t", "t_hour", "t_weekday", "t_days"]
    assert table["t_hour"].to_pylist() == ["0", "23", "13", None]
    assert table["t_weekday"].to_pylist() == ["Thursday", "Wednesday", "Friday", None]
    np.testing.assert_array_equal(table["t_days"].to_numpy(), [0, -1 / 86_400, SECONDS / 86_400, np.nan])


@pytest.mark.parametrize(
    ("values", "match"),
    [
        (
            ["2024-05-31", "soon", "later"],
            r"'time' of the training table holds 'soon' in row 1: a timestamp is seconds",
        ),
        (["2024-05-31", "1", "2024-13-01", "2024-05-31 25:00Z"], r"holds '2024-13-01' in row 2"),
        (["2024/05/31", "31/05/2024"], r"holds '31/05/2024' in row 1"),  # slashes have the month first
        ([[1]], r"holds values of type list<item: int64>"),
        # Excel's day number of 1997-05-31, a year, 1997-05-31 12:00 without spaces, and a year of two digits.
        ([35581, 35582], r"holds 35581 in row 0, which is read as 1970-01-01T09:53:01, and most .*: .* or 20240531"),
        ([SECONDS, 1997, 1998], r"holds 1997 in row 1, which is read as 1970-01-01T00:33:17, and most"),
        ([99705311200], r"holds 99705311200 in row 0, which is read as 5129-"),
        (["0097-05-31"], r"holds 0097-05-31 in row 0, which is read as 0097-05-31T00:00:00, and most"),
    ],
)
def test_what_is_no_timestamp_is_named(values, match):
    refused(match, lambda: seconds(values))


@pytest.mark.parametrize("kind", [pa.int64(), pa.float64(), pa.string()])
def test_numbers_are_dates_where_half_of_them_can_be(kind):
    dates = pa.array([20240531, None, 20231231]).cast(kind)  # 2023-12-31 is 152 days before 2024-05-31
    np.testing.assert_array_equal(seconds(dates), [MIDNIGHT, np.nan, MIDNIGHT - 152 * 86_400])
    for odd in (20230229, 20230100, 20230001, 20231301, 19491231, 21010101, 99991231, 100_000):
        assert seconds(pa.array([20240531, odd]).cast(kind)) == [MIDNIGHT, odd]
        if odd < 90_000_000:
            log_of_seconds = [20240531, odd, 1_000_000]
            assert seconds(pa.array(log_of_seconds).cast(kind)) == log_of_seconds


def test_training_says_how_numbers_are_read():
    # The first half year from a start of 0, as in a log that counts its seconds: the dates would be in 2024.
    assert seconds([20240531], known=(0, 182)) == [20240531]
    assert seconds([20240531], known=(9_800, 9_900)) == [MIDNIGHT]  # 1996 and 1997: neither is near
    # Each by itself, whatever is beside it.
    assert seconds([20240531, SECONDS, 0, 99991231], known=(19_800, 19_900)) == [MIDNIGHT, SECONDS, 0, 99991231]
    assert seconds(["20240531", str(SECONDS)], known=(19_800, 19_900)) == [MIDNIGHT, SECONDS]
    born = [-1_000_000_000, -1_100_000_000]  # 1938, 1935
    refused(r"which is read as 1938-", lambda: seconds(born))
    assert seconds(born, known=(-20_000, 10_000)) == born
    assert seconds([SECONDS, SECONDS, *born]) == [SECONDS, SECONDS, *born]  # half is not most
