"""Columns of numbers and times, and their statistics."""

from __future__ import annotations

import datetime

import numpy as np
import pyarrow as pa
import pytest

from apps.recsys.encoding.features import ContinuousFeature
from apps.recsys.encoding.numbers import boundaries, statistics, to_float32, to_numbers, to_order


def part(values, kind=None, where="the training table"):
    return (where, pa.chunked_array([pa.array(values, kind)]))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1, None], [1, np.nan]),
        ([" 1.5", "", "-2e3", "nan", "inf"], [1.5, np.nan, -2000, np.nan, np.nan]),
        (["3", "NA", "N/A", "NULL", "null", "None", "?", "NaN"], [3, *[np.nan] * 7]),
        ([True, False], [1, 0]),
        ([1e300, -1e300, 3.0], [np.nan, np.nan, 3]),  # float32 cannot hold them
        ([None], [np.nan]),
    ],
)
def test_numbers(values, expected):
    numbers = to_float32(to_numbers([part(values)], "c"))
    assert numbers.dtype == np.float32
    assert np.array_equal(numbers, np.array(expected, dtype=np.float32), equal_nan=True)


@pytest.mark.parametrize("position", [0, 1, 6])
def test_the_first_value_that_is_no_number_is_named_with_its_row(position):
    values = ["1", "2", "3", "4", "5", "6", "7"]
    values[position] = "few"
    values[6] = "few"
    chunked = pa.chunked_array([pa.array(values[:3]), pa.array(values[3:])])
    with pytest.raises(ValueError, match=f"column 'c' of t must hold numbers: row {position} holds 'few'"):
        to_numbers([("t", chunked)], "c")
    with pytest.raises(ValueError, match="holds values of type date32"):
        to_numbers([part([datetime.date(2024, 1, 1)])], "c")


def test_statistics_by_hand():
    # finite values 1, 2, 3, 6: mean 3, variance (4 + 1 + 0 + 9) / 4 = 3.5; one of five is missing
    s = statistics("x", np.array([6, 1, np.nan, 2, 3], dtype=np.float32))
    assert s.mean == 3
    assert s.std == pytest.approx(3.5**0.5)
    assert s.quantiles == (1, 2, 3)  # each value a bin of its own: (.., 1], (1, 2], (2, 3], (3, ..)
    assert s.missing == pytest.approx(0.2)
    assert (s.least, s.most) == (1, 6)
    assert statistics("x", np.array([5, 5], dtype=np.float32)) == ContinuousFeature("x", 5, 1, (), 0)
    assert statistics("x", np.array([np.nan], dtype=np.float32)) == ContinuousFeature("x", 0, 1, (), 1)


def test_bins_of_distinct_values_are_of_equal_count():
    values = np.random.RandomState(0).permutation(25_600).astype(np.float32)
    edges = statistics("x", values).quantiles
    assert len(edges) == 255
    counts = np.bincount(np.searchsorted(edges, values, side="left"))  # as torch.bucketize does by default
    assert counts.min() >= 99
    assert counts.max() <= 101


@pytest.mark.parametrize("share", [0.001, 0.3, 0.999])
def test_a_frequent_value_has_a_bin_of_its_own_wherever_it_lies(share):
    for others, heavy in (((1, 2), 0), ((0, 2), 1), ((0, 1), 2)):
        num = round(1000 * share)
        values = np.array([heavy] * num + [*others] * (1000 - num), dtype=np.float32)
        edges = boundaries(np.sort(values))
        bins = {v: np.searchsorted(edges, np.float32(v)) for v in (0, 1, 2)}
        assert share < 1 / 256 or all(bins[v] != bins[heavy] for v in others)
        assert len(edges) > 0


def test_times_and_dates_sort_as_they_should():
    days = [datetime.datetime(2024, 5, 2), datetime.datetime(1969, 1, 1), datetime.datetime(2024, 5, 1)]
    assert np.argsort(to_order([part(days)], "t")).tolist() == [1, 2, 0]
    assert to_order([part(["10", "9.5"])], "t").tolist() == [10, 9.5]
    assert to_order([part(["10", "9.5"], pa.string_view())], "t").tolist() == [10, 9.5]
    for zone in ("", "Z"):  # as text they would sort alike, as numbers they are none
        times = [f"2024-05-02T00:00:01{zone}", f"2024-05-02T00:00:00{zone}"]
        assert np.diff(to_order([part(times)], "t")).tolist() == [-1_000_000]
    assert np.diff(to_order([part(["2024/05/02 00:00:01", "2024/05/01"])], "t")).tolist() == [-86_401_000_000]
    with pytest.raises(ValueError, match="column 't' orders the rows, but has no value in row 1"):
        to_order([part([*days[:1], None])], "t")
    with pytest.raises(ValueError, match="row 0 holds 'May'; times are numbers, or dates"):
        to_order([part(["May"])], "t")


def test_the_few_values_beside_a_frequent_one_are_told_apart():
    # 81,920 rows: zeros have one bin, 1 to 3,000 the 255 others; a bin has at least 81920 / 8192 = 10
    values = np.zeros(81_920, dtype=np.float32)
    values[:3000] = np.arange(1, 3001)
    edges = statistics("x", values).quantiles
    counts = np.bincount(np.searchsorted(edges, values, side="left"))
    assert counts[0] == 81_920 - 3000
    assert len(counts) == 256
    assert counts[1:].min() >= 11
    assert counts[1:].max() <= 13
    # 100 others: bins of at least 10
    values[100:3000] = 0
    edges = statistics("x", values).quantiles
    assert len(edges) == 10
