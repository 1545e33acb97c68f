"""Columns as rows of embedding tables, as labels, as numbers and as sequences, and their profiles."""

import datetime
import math
import re
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pytest
from refusals import refused

from apps.recsys.encoding.categories import (
    MISSING,
    factorize,
    hash_text,
    split_values,
    to_given,
    to_hashed,
    to_vocabulary,
)
from apps.recsys.encoding.features import ContinuousFeature
from apps.recsys.encoding.labels import determines, to_labels
from apps.recsys.encoding.numbers import boundaries, statistics, to_float32, to_numbers, to_order
from apps.recsys.encoding.profiles import Counts, Profile, stability_index
from apps.recsys.encoding.sequences import last_values, without_row_0
from apps.recsys.schema import TaskConfig


def part(values, kind=None, where="the training table"):
    return (where, pa.chunked_array([pa.array(values, kind)]))


def decoded(codes):
    values = codes.values.to_pylist()
    return [None if c == MISSING else values[c] for c in codes.codes]


def fnv_and_mix(text: str) -> int:
    """The definitions, a byte at a time: FNV-1a of 64 bits, then the finalizer of splitmix64."""
    mask, h = 2**64 - 1, 0xCBF29CE484222325
    for byte in text.encode():
        h = ((h ^ byte) * 0x100000001B3) & mask
    h = ((h ^ (h >> 30)) * 0xBF58476D1CE4E5B9) & mask
    h = ((h ^ (h >> 27)) * 0x94D049BB133111EB) & mask
    return h ^ (h >> 31)


DAY = datetime.datetime(2024, 5, 3)


@pytest.mark.parametrize(
    ("values", "kind", "expected"),
    [
        (["a", " a ", "", None, "NA"], None, ["a", "a", None, None, "NA"]),
        # As tools write whole numbers beside missing ones; 1.10 and 007.0 are names.
        (["5", "5.0", "-3.00", "5.5", "1.10", "007.0"], None, ["5", "5", "-3", "5.5", "1.10", "007.0"]),
        ([3, 3, None], pa.int64(), ["3", "3", None]),
        ([3.0, 2.5, float("nan"), 1e15, None], None, ["3", "2.5", None, "1000000000000000", None]),
        ([True, False, None], None, ["true", "false", None]),
        ([Decimal(5), Decimal("-5.5"), Decimal(50), None], pa.decimal128(10, 2), ["5", "-5.5", "50", None]),
        ([Decimal(0), Decimal(500), Decimal("0.05")], pa.decimal128(38, 18), ["0", "500", "0.05"]),
        ([Decimal(0), Decimal(500)], pa.decimal128(38, 0), ["0", "500"]),
        ([datetime.date(2024, 5, 31)], None, ["2024-05-31"]),
        (["x", None, "x"], pa.dictionary(pa.int8(), pa.string()), ["x", None, "x"]),
        ([" a ", "5.0", "True", None], pa.string_view(), ["a", "5", "true", None]),
        ([None, None], pa.null(), [None, None]),
        ([], pa.string(), []),
    ],
)
def test_values_of_any_type_are_text(values, kind, expected):
    assert decoded(factorize([part(values, kind)], "c")) == expected


def test_a_number_and_its_text_are_one_value_and_lists_are_refused():
    train = ("the training table", pa.chunked_array([pa.array([5, 7]), pa.array([7])]))
    codes = factorize([train, part(["7", "8"]), part([5.0])], "c")
    assert (decoded(codes), codes.values.to_pylist()) == (["5", "7", "7", "7", "8", "5"], ["5", "7", "8"])
    with pytest.raises(ValueError, match=r"'c' .* type list<.*it must have one value a row; a feature of lists"):
        factorize([part([[1]])], "c")


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.dictionary(pa.int8(), pa.binary())])
def test_bytes_that_are_no_text_are_refused_by_name(kind):
    assert decoded(factorize([part([b"a", "ü".encode(), None], kind)], "c")) == ["a", "ü", None]
    match = re.escape(r"column 'c' of the training table holds b'Z\xfcrich', which is no UTF-8 text") + "$"
    refused(match, lambda: factorize([part([b"a", None, b"Z\xfcrich", b"\xff"], kind)], "c"))
    refused(match, lambda: split_values([part([[b"a"], [], [b"Z\xfcrich"]], pa.list_(pa.binary()))], "c", "|"))


def test_a_vocabulary_has_the_frequent_values_first_and_only_those_of_training():
    codes = factorize([part(["b", "a", "c", "a", "d", "b", None, "e"])], "c")
    train = np.array([1, 1, 1, 1, 1, 1, 1, 0], dtype=bool)
    # counts in training: a 2, b 2, c 1, d 1; e is not there. Ties by text.
    rows = to_vocabulary(codes, train)
    assert (rows.values.to_pylist(), rows.rows.tolist()) == (["a", "b", "c", "d"], [2, 1, 3, 1, 4, 2, 0, 0])
    assert rows.unseen.tolist() == [False] * 7 + [True]  # a missing value is not an unseen one
    assert rows.num_rows == 5
    rare = to_vocabulary(codes, train, min_count=2)
    assert rare.rows.tolist() == [2, 1, 0, 1, 0, 2, 0, 0]
    assert rare.unseen.tolist() == [False, False, True, False, True, False, False, True]


def test_the_hash_is_that_of_its_definition_and_its_rows_spread_evenly():
    texts = ["", "a", "foobar", "ä€", "x" * 100, "12345", "b"]
    array = pa.array(["cut off", *texts]).slice(1)  # a slice starts inside its buffer
    assert hash_text(array).tolist() == [fnv_and_mix(t) for t in texts]
    # FNV-1a of "a" is af63dc4c8601ec8c in its authors' list of test vectors.
    assert ((0xCBF29CE484222325 ^ 0x61) * 0x100000001B3) % 2**64 == 0xAF63DC4C8601EC8C
    assert hash_text(pa.array([], pa.string())).tolist() == []
    codes = factorize([part([*map(str, range(20_000)), None])], "c")
    train = np.ones(20_001, dtype=bool)
    train[100:200] = False
    rows = to_hashed(codes, train, 101)
    assert (rows.rows[-1], rows.rows[:-1].min(), rows.rows.max()) == (0, 1, 100)
    # 200 values a row on average; chi-squared of 99 degrees of freedom exceeds 150 with probability 7e-4.
    counts = np.bincount(rows.rows[:-1])[1:]
    assert ((counts - 200) ** 2 / 200).sum() < 150
    assert np.flatnonzero(rows.unseen).tolist() == list(range(100, 200))  # counted, though they have a row


def test_given_row_numbers_are_taken_as_they_are_and_checked():
    train = np.array([True, True, False, False])
    codes = factorize([part([3, 0, 0, 2])], "c")
    rows = to_given(codes, train, 4, "c", np.arange(4))
    assert (rows.rows.tolist(), rows.unseen.tolist()) == ([3, 0, 0, 2], [False, False, False, True])
    codes = factorize([part([3, 1, None, 2])], "c")
    rows = to_given(codes, train, 4, "c", np.arange(4))
    assert (rows.rows.tolist(), rows.unseen.tolist()) == ([3, 1, 0, 2], [False, False, False, True])
    # One id would be both a value and none.
    codes = factorize([part([3, 1, None, 0])], "c")
    with pytest.raises(ValueError, match="column 'c' has no value in row 9, which num_rows takes as row number 0, and"):
        to_given(codes, train, 4, "c", np.array([7, 8, 9, 9]))
    for bad in (4, -1, "x", 2.5):
        codes = factorize([part(["0", "1", "2", str(bad)])], "c")
        with pytest.raises(ValueError, match=f"column 'c' holds '{bad}' in row 3: num_rows=4 takes row numbers 0 to 3"):
            to_given(codes, train, 4, "c", np.arange(4))


@pytest.mark.parametrize(
    "parts",
    [
        [part(["a|b", None, "", " b || c ", "a|b"])],
        [part(["['a', 'b']", None, "[]", '["b", "c"]', "a|b"])],  # as Python and JSON write lists
        [part(["['a' 'b']", "", " [ ] ", "['b'\n 'c']", "['a','b']"])],  # as NumPy prints them
        [part([["a", "b"], None, [], ["b", "c"], ["a", "b"]])],
        [part([["a", "b"], None]), part([[], ["b", "c"], ["a", "b"]], pa.large_list(pa.string()))],
    ],
)
def test_multi_valued_columns_as_text_and_as_lists(parts):
    offsets, codes = split_values(parts, "g", "|")
    assert (offsets.tolist(), decoded(codes)) == ([0, 2, 2, 2, 4, 6], ["a", "b", "b", "c", "a", "b"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("""["it's", 'b', None, True, 5.0]""", ["it's", "b", None, "true", "5"]),
        (r"""['say "no"', 'a\'b', 'x|y']""", ['say "no"', "a'b", "x|y"]),
        ('["New York", "b", null, true, 5.0]', ["New York", "b", None, "true", "5"]),
        ("[ 12  -3\n 4.]", ["12", "-3", "4"]),
        ("['New York' 'Area 51']", ["New York", "Area 51"]),
        ("[deleted]", ["[deleted]"]),
        ("[1]|[x]", ["[1]", "[x]"]),
        ("[{'id': 1}]", ["[{'id': 1}]"]),
        ("[" * 100_000 + "]", ["[" * 100_000 + "]"]),
    ],
)
def test_text_is_a_list_where_python_or_json_would_read_one(text, expected):
    offsets, codes = split_values([part([text, "z"])], "g", "|")
    assert (decoded(codes), offsets.tolist()) == ([*expected, "z"], [0, len(expected), len(expected) + 1])
    offsets, codes = split_values([part([[1, None], [2]])], "g", "|")  # a missing element is a missing value
    assert (offsets.tolist(), decoded(codes)) == ([0, 2, 3], ["1", None, "2"])


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
    codes = factorize([("a", pa.chunked_array([one])), ("b", pa.chunked_array([pa.array(other)]))], "c").codes
    assert codes.tolist() == [*range(len(one)), *range(len(one))]


@pytest.mark.parametrize(
    ("values", "task", "expected"),
    [(["0", "1", None], TaskConfig("y"), [0, 1, np.nan]),
     (["0", "NA", "1", "?"], TaskConfig("y"), [0, np.nan, 1, np.nan]),
     ([True, False, None], TaskConfig("y"), [1, 0, np.nan]),
     ([1.0, 0.0, float("nan")], TaskConfig("y"), [1, 0, np.nan]),
     ([" 50+.", "-50", "", "49+"], TaskConfig("y", positive=("50+.", "49+")), [1, 0, np.nan, 1]),
     ([3, 4, 5, None], TaskConfig("y", at_least=4), [0, 1, 1, np.nan]),
     (["3.5", "4", ""], TaskConfig("y", at_least=4), [0, 1, np.nan])],
)  # fmt: skip
def test_values_as_labels(values, task, expected):
    labels = to_labels([part(values)], "t", task)
    assert np.array_equal(labels, np.array(expected, dtype=np.float32), equal_nan=True)


def test_labels_are_checked_whatever_the_type_of_positive_values():
    with pytest.raises(ValueError, match="task 't': column 'y' must hold 0 and 1, but row 2 holds '2'"):
        to_labels([part([0, 1, 2])], "t", TaskConfig("y"))
    many = [*range(2), *range(2000)]  # more values than are looked at one by one
    refused("column 'y' must hold 0 and 1, but row 4 holds '2'", lambda: to_labels([part(many)], "t", TaskConfig("y")))
    with pytest.raises(ValueError, match="column 'y' never holds positive='yes'; it holds 'Yes', 'no'"):
        to_labels([part(["Yes", "no"])], "t", TaskConfig("y", positive=("yes",)))
    with pytest.raises(ValueError, match="must hold numbers: row 1 holds 'good'"):
        to_labels([part(["3", "good"])], "t", TaskConfig("y", at_least=4))
    label = np.array([0, 1, 1, 0, 1, np.nan], dtype=np.float32)
    assert determines(np.array([4, 2, 2, 4, 2, 2]), label)
    assert not determines(np.array([4, 2, 2, 4, 4, 2]), label)  # one row differs
    assert not determines(np.arange(6), label)  # an id of the row says nothing
    assert determines(np.array([MISSING, 2, 2, MISSING, 2, 2]), label)  # that it is missing may
    assert not determines(np.array([0, 0, 0, 0, 0, 0]), np.zeros(6, dtype=np.float32))
    for values, positive in (([0, 1, 2], (2, 1)), (["0.0", "1", "2"], (1.0, "2")), ([False, True, True], (True,))):
        assert to_labels([part(values)], "t", TaskConfig("c", positive=positive)).tolist() == [0, 1, 1]
        with pytest.raises(ValueError, match="task 't': column 'c' never holds positive=7"):
            to_labels([part(values)], "t", TaskConfig("c", positive=(7,)))


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
    refused(f"column 'c' of t must hold numbers: row {position} holds 'few'", lambda: to_numbers([("t", chunked)], "c"))
    refused("holds values of type date32", lambda: to_numbers([part([datetime.date(2024, 1, 1)])], "c"))


def test_statistics_by_hand():
    # finite values 1, 2, 3, 6: mean 3, variance (4 + 1 + 0 + 9) / 4 = 3.5; one of five is missing
    s = statistics("x", np.array([6, 1, np.nan, 2, 3], dtype=np.float32))
    assert (s.mean, s.std) == (3, pytest.approx(3.5**0.5))
    assert s.quantiles == (1, 2, 3)  # each value a bin of its own: (.., 1], (1, 2], (2, 3], (3, ..)
    assert (s.missing, s.least, s.most) == (pytest.approx(0.2), 1, 6)
    assert statistics("x", np.array([5, 5], dtype=np.float32)) == ContinuousFeature("x", 5, 1, (), 0)
    assert statistics("x", np.array([np.nan], dtype=np.float32)) == ContinuousFeature("x", 0, 1, (), 1)


def test_bins_of_distinct_values_are_of_equal_count_and_the_few_beside_a_frequent_one_are_told_apart():
    values = np.random.RandomState(0).permutation(25_600).astype(np.float32)
    edges = statistics("x", values).quantiles
    assert len(edges) == 255
    counts = np.bincount(np.searchsorted(edges, values, side="left"))  # as torch.bucketize does by default
    assert counts.min() >= 99
    assert counts.max() <= 101
    # 81,920 rows: zeros have one bin, 1 to 3,000 the 255 others; a bin has at least 81920 / 8192 = 10
    values = np.zeros(81_920, dtype=np.float32)
    values[:3000] = np.arange(1, 3001)
    edges = statistics("x", values).quantiles
    counts = np.bincount(np.searchsorted(edges, values, side="left"))
    assert (counts[0], len(counts)) == (81_920 - 3000, 256)
    assert counts[1:].min() >= 11
    assert counts[1:].max() <= 13
    # 100 others: bins of at least 10
    values[100:3000] = 0
    edges = statistics("x", values).quantiles
    assert len(edges) == 10


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
    refused("column 't' orders the rows, but has no value in row 1", lambda: to_order([part([*days[:1], None])], "t"))
    refused("row 0 holds 'May'; times are numbers, or dates", lambda: to_order([part(["May"])], "t"))


def test_the_last_values_are_kept_without_those_that_have_no_row():
    # Rows of 3, 0, 1 and 2 values; at most 2 are kept: positions 1 2, none, 3, 4 5.
    offsets, position = last_values(np.array([0, 3, 3, 4, 6]), 2)
    assert (offsets.tolist(), position.tolist()) == ([0, 2, 2, 3, 5], [1, 2, 3, 4, 5])
    same, every = last_values(np.array([0, 3, 3, 4, 6]), 3)
    assert (same.tolist(), every.tolist()) == ([0, 3, 3, 4, 6], [0, 1, 2, 3, 4, 5])
    # [0 5] [] [0] [7 0 2] becomes [5] [] [] [7 2].
    offsets, rows = without_row_0(np.array([0, 2, 2, 3, 6]), np.array([0, 5, 0, 7, 0, 2], np.int32))
    assert (offsets.tolist(), rows.tolist()) == ([0, 1, 1, 1, 3], [5, 7, 2])


NAN = float("nan")


def test_profiles_and_their_stability_index_by_hand():
    # (0.9 - 0.5) ln(0.9 / 0.5) + (0.1 - 0.5) ln(0.1 / 0.5) = 0.4 * 0.587787 + 0.4 * 1.609438 = 0.878890
    assert stability_index((0.5, 0.5), (0.9, 0.1)) == pytest.approx(0.878890, abs=1e-6)
    assert stability_index((0.3, 0.7), (0.3, 0.7)) == 0
    # An empty bin counts as 1 in 10,000: 0.4999 ln 5000, and 0.5 ln 2 for the one that took its rows.
    assert stability_index((0.5, 0.5), (1, 0)) == pytest.approx(0.4999 * math.log(5000) + 0.5 * math.log(2))
    values = np.array([*range(1, 21), *[NAN] * 5], np.float32)  # two numbers in each tenth, a fifth is missing
    profile = Profile.of_numbers(values)
    assert (profile.missing, profile.bounds) == (0.2, (1, 20))
    assert (profile.cuts, profile.shares) == ((2, 4, 6, 8, 10, 12, 14, 16, 18), (0.1,) * 10)
    # A number that most rows have is one bin: 0 up to the sixth decile.
    assert Profile.of_numbers(np.array([0] * 7 + [1, 2, 3], np.float32)).cuts == (0, 1, 2)
    # 2 is in the first bin, 2.5 in the second, 21 and 30 are outside; half of the counts come from each table.
    parts = [Counts.of_numbers(profile, np.array(part, np.float32)) for part in ([2, 2.5, NAN], [21, 30, 18])]
    counts = parts[0] + parts[1]
    assert (counts.num_rows, counts.num_missing, counts.num_odd, counts.total) == (6, 1, 2, 73.5)
    assert counts.bins.tolist() == [1, 1, 0, 0, 0, 0, 0, 0, 1, 2]
    assert Profile.of_numbers(np.array([NAN], np.float32)) == Profile(missing=1.0)
    # 6 of 10 values have row 1, 3 row 2, and one is too rare for a row; 2 of 12 rows of the table have no value.
    rows = np.array([1] * 6 + [2] * 3 + [0], np.int32)
    unseen = rows == 0
    profile = Profile.of_categories(rows, unseen, np.arange(12) < 2)
    assert profile == Profile(missing=2 / 12, unseen=0.1, rows=(1, 2), shares=(0.6, 0.3, 0.1))
    # Values below 1 % are counted together: 3 of 400 have row 2.
    rows = np.array([1] * 397 + [2] * 3, np.int32)
    profile = Profile.of_categories(rows, rows == 0, np.zeros(400, bool))
    assert (profile.rows, profile.shares) == ((1,), (0.9925, 0.0075))
