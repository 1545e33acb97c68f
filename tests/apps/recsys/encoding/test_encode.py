"""Columns as numbers: values of any type as text, rows of embedding tables, statistics, labels."""

from __future__ import annotations

import datetime
import re

import numpy as np
import pyarrow as pa
import pytest

from apps.recsys.encoding import encode
from apps.recsys.schema import TaskConfig


def part(values, kind=None, where="the training table"):
    return (where, pa.chunked_array([pa.array(values, kind)]))


def decoded(codes):
    values = codes.values.to_pylist()
    return [None if c == encode.MISSING else values[c] for c in codes.codes]


@pytest.mark.parametrize(
    ("values", "kind", "expected"),
    [
        (["a", " a ", "", None, "NA"], None, ["a", "a", None, None, "NA"]),
        # As tools write whole numbers beside missing ones; 1.10 and 007.0 are names.
        (["5", "5.0", "-3.00", "5.5", "1.10", "007.0"], None, ["5", "5", "-3", "5.5", "1.10", "007.0"]),
        ([3, 3, None], pa.int64(), ["3", "3", None]),
        ([3.0, 2.5, float("nan"), 1e15, None], None, ["3", "2.5", None, "1000000000000000", None]),
        ([True, False, None], None, ["true", "false", None]),
        ([datetime.date(2024, 5, 31)], None, ["2024-05-31"]),
        (["x", None, "x"], pa.dictionary(pa.int8(), pa.string()), ["x", None, "x"]),
        ([None, None], pa.null(), [None, None]),
        ([], pa.string(), []),
    ],
)
def test_values_of_any_type_are_text(values, kind, expected):
    assert decoded(encode.factorize([part(values, kind)], "c")) == expected


def test_a_number_and_its_text_are_one_value_across_tables_and_chunks():
    train = ("the training table", pa.chunked_array([pa.array([5, 7]), pa.array([7])]))
    codes = encode.factorize([train, part(["7", "8"]), part([5.0])], "c")
    assert decoded(codes) == ["5", "7", "7", "7", "8", "5"]
    assert codes.values.to_pylist() == ["5", "7", "8"]


def test_lists_are_refused_where_one_value_is_expected():
    with pytest.raises(ValueError, match=r"column 'c' .* type list<.*list it under multi_valued, if it is a feature"):
        encode.factorize([part([[1]])], "c")


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.dictionary(pa.int8(), pa.binary())])
def test_bytes_that_are_no_text_are_refused_by_name(kind):
    assert decoded(encode.factorize([part([b"a", "ü".encode(), None], kind)], "c")) == ["a", "ü", None]
    match = re.escape(r"column 'c' of the training table holds b'Z\xfcrich', which is no UTF-8 text") + "$"
    with pytest.raises(ValueError, match=match):
        encode.factorize([part([b"a", None, b"Z\xfcrich", b"\xff"], kind)], "c")
    with pytest.raises(ValueError, match=match):
        encode.split_values([part([[b"a"], [], [b"Z\xfcrich"]], pa.list_(pa.binary()))], "c", "|")


def test_a_vocabulary_has_the_frequent_values_first_and_only_those_of_training():
    codes = encode.factorize([part(["b", "a", "c", "a", "d", "b", None, "e"])], "c")
    train = np.array([1, 1, 1, 1, 1, 1, 1, 0], dtype=bool)
    # counts in training: a 2, b 2, c 1, d 1; e is not there. Ties by text.
    rows = encode.to_vocabulary(codes, train)
    assert rows.values.to_pylist() == ["a", "b", "c", "d"]
    assert rows.rows.tolist() == [2, 1, 3, 1, 4, 2, 0, 0]
    assert rows.unseen.tolist() == [False] * 7 + [True]  # a missing value is not an unseen one
    assert rows.num_rows == 5
    rare = encode.to_vocabulary(codes, train, min_count=2)
    assert rare.rows.tolist() == [2, 1, 0, 1, 0, 2, 0, 0]
    assert rare.unseen.tolist() == [False, False, True, False, True, False, False, True]


def fnv_and_mix(text: str) -> int:
    """The definitions, a byte at a time: FNV-1a of 64 bits, then the finalizer of splitmix64."""
    mask, h = 2**64 - 1, 0xCBF29CE484222325
    for byte in text.encode():
        h = ((h ^ byte) * 0x100000001B3) & mask
    h = ((h ^ (h >> 30)) * 0xBF58476D1CE4E5B9) & mask
    h = ((h ^ (h >> 27)) * 0x94D049BB133111EB) & mask
    return h ^ (h >> 31)


def test_the_hash_is_that_of_its_definition_for_texts_of_any_length():
    texts = ["", "a", "foobar", "ä€", "x" * 100, "12345", "b"]
    array = pa.array(["cut off", *texts]).slice(1)  # a slice starts inside its buffer
    assert encode.hash_text(array).tolist() == [fnv_and_mix(t) for t in texts]
    # FNV-1a of "a" is af63dc4c8601ec8c in its authors' list of test vectors.
    assert ((0xCBF29CE484222325 ^ 0x61) * 0x100000001B3) % 2**64 == 0xAF63DC4C8601EC8C
    assert encode.hash_text(pa.array([], pa.string())).tolist() == []


def test_hashed_rows_are_1_to_num_rows_and_spread_evenly():
    codes = encode.factorize([part([*map(str, range(20_000)), None])], "c")
    train = np.ones(20_001, dtype=bool)
    train[100:200] = False
    rows = encode.to_hashed(codes, train, 101)
    assert rows.rows[-1] == 0
    assert rows.rows[:-1].min() == 1
    assert rows.rows.max() == 100
    # 200 values a row on average; chi-squared of 99 degrees of freedom exceeds 150 with probability 7e-4.
    counts = np.bincount(rows.rows[:-1])[1:]
    assert ((counts - 200) ** 2 / 200).sum() < 150
    assert np.flatnonzero(rows.unseen).tolist() == list(range(100, 200))  # counted, though they have a row


def test_given_row_numbers_are_taken_as_they_are_and_checked():
    train = np.array([True, True, False, False])
    codes = encode.factorize([part([3, 0, 0, 2])], "c")
    rows = encode.to_given(codes, train, 4, "c", np.arange(4))
    assert rows.rows.tolist() == [3, 0, 0, 2]
    assert rows.unseen.tolist() == [False, False, False, True]
    codes = encode.factorize([part([3, 1, None, 2])], "c")
    rows = encode.to_given(codes, train, 4, "c", np.arange(4))
    assert rows.rows.tolist() == [3, 1, 0, 2]
    assert rows.unseen.tolist() == [False, False, False, True]
    # One id would be both a value and none.
    codes = encode.factorize([part([3, 1, None, 0])], "c")
    with pytest.raises(ValueError, match="column 'c' has no value in row 9, which num_rows takes as row number 0, and"):
        encode.to_given(codes, train, 4, "c", np.array([7, 8, 9, 9]))
    for bad in (4, -1, "x", 2.5):
        codes = encode.factorize([part(["0", "1", "2", str(bad)])], "c")
        with pytest.raises(ValueError, match=f"column 'c' holds '{bad}' in row 3: num_rows=4 takes row numbers 0 to 3"):
            encode.to_given(codes, train, 4, "c", np.arange(4))


@pytest.mark.parametrize(
    "parts",
    [
        [part(["a|b", None, "", " b || c ", "a|b"])],
        [part([["a", "b"], None, [], ["b", "c"], ["a", "b"]])],
        [part([["a", "b"], None]), part([[], ["b", "c"], ["a", "b"]], pa.large_list(pa.string()))],
    ],
)
def test_multi_valued_columns_as_text_and_as_lists(parts):
    offsets, codes = encode.split_values(parts, "g", "|")
    assert offsets.tolist() == [0, 2, 2, 2, 4, 6]
    assert decoded(codes) == ["a", "b", "b", "c", "a", "b"]


def test_a_missing_element_of_a_list_is_a_missing_value():
    offsets, codes = encode.split_values([part([[1, None], [2]])], "g", "|")
    assert offsets.tolist() == [0, 2, 3]
    assert decoded(codes) == ["1", None, "2"]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([1, None], [1, np.nan]),
        ([" 1.5", "", "-2e3", "nan", "inf"], [1.5, np.nan, -2000, np.nan, np.nan]),
        ([True, False], [1, 0]),
        ([1e300, -1e300, 3.0], [np.nan, np.nan, 3]),  # float32 cannot hold them
        ([None], [np.nan]),
    ],
)
def test_numbers(values, expected):
    found = encode.to_float32(encode.to_numbers([part(values)], "c"))
    assert found.dtype == np.float32
    assert np.array_equal(found, np.array(expected, dtype=np.float32), equal_nan=True)


@pytest.mark.parametrize("position", [0, 1, 6])
def test_the_first_value_that_is_no_number_is_named_with_its_row(position):
    values = ["1", "2", "3", "4", "5", "6", "7"]
    values[position] = "NA"
    values[6] = "NA"
    chunked = pa.chunked_array([pa.array(values[:3]), pa.array(values[3:])])
    with pytest.raises(ValueError, match=f"column 'c' of t must hold numbers: row {position} holds 'NA'"):
        encode.to_numbers([("t", chunked)], "c")
    with pytest.raises(ValueError, match="holds values of type date32"):
        encode.to_numbers([part([datetime.date(2024, 1, 1)])], "c")


def test_statistics_by_hand():
    # finite values 1, 2, 3, 6: mean 3, variance (4 + 1 + 0 + 9) / 4 = 3.5; one of five is missing
    s = encode.statistics(np.array([6, 1, np.nan, 2, 3], dtype=np.float32))
    assert s.mean == 3
    assert s.std == pytest.approx(3.5**0.5)
    assert s.quantiles == (1, 2, 3)  # each value a bin of its own: (.., 1], (1, 2], (2, 3], (3, ..)
    assert s.missing == pytest.approx(0.2)
    assert encode.statistics(np.array([5, 5], dtype=np.float32)) == encode.Statistics(5, 1, (), 0)
    assert encode.statistics(np.array([np.nan], dtype=np.float32)) == encode.Statistics(0, 1, (), 1)


def test_bins_of_distinct_values_are_of_equal_count():
    values = np.random.RandomState(0).permutation(25_600).astype(np.float32)
    edges = encode.statistics(values).quantiles
    assert len(edges) == 255
    counts = np.bincount(np.searchsorted(edges, values, side="left"))  # as torch.bucketize does by default
    assert counts.min() >= 99
    assert counts.max() <= 101


@pytest.mark.parametrize("share", [0.001, 0.3, 0.999])
def test_a_frequent_value_has_a_bin_of_its_own_wherever_it_lies(share):
    for others, heavy in (((1, 2), 0), ((0, 2), 1), ((0, 1), 2)):
        num = round(1000 * share)
        values = np.array([heavy] * num + [*others] * (1000 - num), dtype=np.float32)
        edges = encode.boundaries(np.sort(values))
        bins = {v: np.searchsorted(edges, np.float32(v)) for v in (0, 1, 2)}
        mine = bins[heavy]
        assert share < 1 / 256 or all(bins[v] != mine for v in others)
        assert len(edges) > 0


@pytest.mark.parametrize(
    ("values", "task", "expected"),
    [
        (["0", "1", None], TaskConfig("y"), [0, 1, np.nan]),
        ([True, False, None], TaskConfig("y"), [1, 0, np.nan]),
        ([1.0, 0.0, float("nan")], TaskConfig("y"), [1, 0, np.nan]),
        ([" 50+.", "-50", "", "49+"], TaskConfig("y", positive=("50+.", "49+")), [1, 0, np.nan, 1]),
        ([3, 4, 5, None], TaskConfig("y", at_least=4), [0, 1, 1, np.nan]),
        (["3.5", "4", ""], TaskConfig("y", at_least=4), [0, 1, np.nan]),
    ],
)
def test_labels(values, task, expected):
    found = encode.to_labels([part(values)], "t", task)
    assert np.array_equal(found, np.array(expected, dtype=np.float32), equal_nan=True)


def test_labels_that_are_none_are_refused():
    with pytest.raises(ValueError, match="task 't': column 'y' must hold 0 and 1, but row 2 holds '2'"):
        encode.to_labels([part([0, 1, 2])], "t", TaskConfig("y"))
    many = [*range(2), *range(2000)]  # more values than are looked at one by one
    with pytest.raises(ValueError, match="column 'y' must hold 0 and 1, but row 4 holds '2'"):
        encode.to_labels([part(many)], "t", TaskConfig("y"))
    with pytest.raises(ValueError, match="column 'y' never holds positive='yes'; it holds 'Yes', 'no'"):
        encode.to_labels([part(["Yes", "no"])], "t", TaskConfig("y", positive=("yes",)))
    with pytest.raises(ValueError, match="must hold numbers: row 1 holds 'good'"):
        encode.to_labels([part(["3", "good"])], "t", TaskConfig("y", at_least=4))


def test_times_and_dates_sort_as_they_should():
    days = [datetime.datetime(2024, 5, 2), datetime.datetime(1969, 1, 1), datetime.datetime(2024, 5, 1)]
    assert np.argsort(encode.to_order([part(days)], "t")).tolist() == [1, 2, 0]
    assert encode.to_order([part(["10", "9.5"])], "t").tolist() == [10, 9.5]
    for zone in ("", "Z"):  # as text they would sort alike, as numbers they are none
        times = [f"2024-05-02T00:00:01{zone}", f"2024-05-02T00:00:00{zone}"]
        assert np.diff(encode.to_order([part(times)], "t")).tolist() == [-1_000_000]
    with pytest.raises(ValueError, match="column 't' orders the rows, but has no value in row 1"):
        encode.to_order([part([*days[:1], None])], "t")
    with pytest.raises(ValueError, match="row 0 holds 'May'; times are numbers, or dates"):
        encode.to_order([part(["May"])], "t")


def test_a_column_that_is_the_label_under_another_name_is_found():
    label = np.array([0, 1, 1, 0, 1, np.nan], dtype=np.float32)
    assert encode.determines(np.array([4, 2, 2, 4, 2, 2]), label)
    assert not encode.determines(np.array([4, 2, 2, 4, 4, 2]), label)  # one row differs
    assert not encode.determines(np.arange(6), label)  # an id of the row says nothing
    assert encode.determines(np.array([encode.MISSING, 2, 2, encode.MISSING, 2, 2]), label)  # that it is missing may
    assert not encode.determines(np.array([0, 0, 0, 0, 0, 0]), np.zeros(6, dtype=np.float32))


def test_the_few_values_beside_a_frequent_one_are_told_apart():
    # 81,920 rows: zeros have one bin, 1 to 3,000 the 255 others; a bin has at least 81920 / 8192 = 10
    values = np.zeros(81_920, dtype=np.float32)
    values[:3000] = np.arange(1, 3001)
    edges = encode.statistics(values).quantiles
    counts = np.bincount(np.searchsorted(edges, values, side="left"))
    assert counts[0] == 81_920 - 3000
    assert len(counts) == 256
    assert counts[1:].min() >= 11
    assert counts[1:].max() <= 13
    # 100 others: bins of at least 10
    values[100:3000] = 0
    edges = encode.statistics(values).quantiles
    assert len(edges) == 10


DAY = datetime.datetime(2024, 5, 3)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (pa.array([0.1, 2.0, 123.456], pa.float32()), ["0.1", "2", "123.456"]),
        (pa.array([True, False]), ["True", "FALSE"]),
        (pa.array([True, False]), ["true", "False"]),
        (
            pa.array(
                [datetime.datetime(2024, 5, 3), datetime.datetime(2024, 5, 3, 12, 0, 0, 50000)], pa.timestamp("us")
            ),
            ["2024-05-03 00:00:00", "2024-05-03 12:00:00.050000"],
        ),
        (pa.array([DAY], pa.timestamp("s")), ["2024-05-03 00:00:00.000"]),
        (pa.array([DAY], pa.timestamp("ns")), ["2024-05-03 00:00:00"]),
    ],
)
def test_values_of_other_types_meet_their_text(one, other):
    codes = encode.factorize([("a", pa.chunked_array([one])), ("b", pa.chunked_array([pa.array(other)]))], "c").codes
    assert codes.tolist() == [*range(len(one)), *range(len(one))]


@pytest.mark.parametrize(
    ("column", "positive"),
    [
        (pa.array([0, 1, 2]), (2, 1)),
        (pa.array(["0.0", "1", "2"]), (1.0, "2")),
        (pa.array([False, True, True]), (True,)),
    ],
)
def test_positive_values_may_be_of_any_type(column, positive):
    part = ("the training table", pa.chunked_array([column]))
    assert encode.to_labels([part], "t", TaskConfig("c", positive=positive)).tolist() == [0, 1, 1]
    with pytest.raises(ValueError, match="task 't': column 'c' never holds positive=7"):
        encode.to_labels([part], "t", TaskConfig("c", positive=(7,)))
