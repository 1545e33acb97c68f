"""Values of any type as text, and as rows of embedding tables."""

from __future__ import annotations

import datetime
import re
from decimal import Decimal

import numpy as np
import pyarrow as pa
import pytest

from apps.recsys.encoding.categories import (
    MISSING,
    factorize,
    hash_text,
    split_values,
    to_given,
    to_hashed,
    to_vocabulary,
)


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


def test_a_number_and_its_text_are_one_value_across_tables_and_chunks():
    train = ("the training table", pa.chunked_array([pa.array([5, 7]), pa.array([7])]))
    codes = factorize([train, part(["7", "8"]), part([5.0])], "c")
    assert decoded(codes) == ["5", "7", "7", "7", "8", "5"]
    assert codes.values.to_pylist() == ["5", "7", "8"]


def test_lists_are_refused_where_one_value_is_expected():
    with pytest.raises(ValueError, match=r"'c' .* type list<.*it must have one value a row; a feature of lists"):
        factorize([part([[1]])], "c")


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.dictionary(pa.int8(), pa.binary())])
def test_bytes_that_are_no_text_are_refused_by_name(kind):
    assert decoded(factorize([part([b"a", "ü".encode(), None], kind)], "c")) == ["a", "ü", None]
    match = re.escape(r"column 'c' of the training table holds b'Z\xfcrich', which is no UTF-8 text") + "$"
    with pytest.raises(ValueError, match=match):
        factorize([part([b"a", None, b"Z\xfcrich", b"\xff"], kind)], "c")
    with pytest.raises(ValueError, match=match):
        split_values([part([[b"a"], [], [b"Z\xfcrich"]], pa.list_(pa.binary()))], "c", "|")


def test_a_vocabulary_has_the_frequent_values_first_and_only_those_of_training():
    codes = factorize([part(["b", "a", "c", "a", "d", "b", None, "e"])], "c")
    train = np.array([1, 1, 1, 1, 1, 1, 1, 0], dtype=bool)
    # counts in training: a 2, b 2, c 1, d 1; e is not there. Ties by text.
    rows = to_vocabulary(codes, train)
    assert rows.values.to_pylist() == ["a", "b", "c", "d"]
    assert rows.rows.tolist() == [2, 1, 3, 1, 4, 2, 0, 0]
    assert rows.unseen.tolist() == [False] * 7 + [True]  # a missing value is not an unseen one
    assert rows.num_rows == 5
    rare = to_vocabulary(codes, train, min_count=2)
    assert rare.rows.tolist() == [2, 1, 0, 1, 0, 2, 0, 0]
    assert rare.unseen.tolist() == [False, False, True, False, True, False, False, True]


def test_the_hash_is_that_of_its_definition_for_texts_of_any_length():
    texts = ["", "a", "foobar", "ä€", "x" * 100, "12345", "b"]
    array = pa.array(["cut off", *texts]).slice(1)  # a slice starts inside its buffer
    assert hash_text(array).tolist() == [fnv_and_mix(t) for t in texts]
    # FNV-1a of "a" is af63dc4c8601ec8c in its authors' list of test vectors.
    assert ((0xCBF29CE484222325 ^ 0x61) * 0x100000001B3) % 2**64 == 0xAF63DC4C8601EC8C
    assert hash_text(pa.array([], pa.string())).tolist() == []


def test_hashed_rows_are_1_to_num_rows_and_spread_evenly():
    codes = factorize([part([*map(str, range(20_000)), None])], "c")
    train = np.ones(20_001, dtype=bool)
    train[100:200] = False
    rows = to_hashed(codes, train, 101)
    assert rows.rows[-1] == 0
    assert rows.rows[:-1].min() == 1
    assert rows.rows.max() == 100
    # 200 values a row on average; chi-squared of 99 degrees of freedom exceeds 150 with probability 7e-4.
    counts = np.bincount(rows.rows[:-1])[1:]
    assert ((counts - 200) ** 2 / 200).sum() < 150
    assert np.flatnonzero(rows.unseen).tolist() == list(range(100, 200))  # counted, though they have a row


def test_given_row_numbers_are_taken_as_they_are_and_checked():
    train = np.array([True, True, False, False])
    codes = factorize([part([3, 0, 0, 2])], "c")
    rows = to_given(codes, train, 4, "c", np.arange(4))
    assert rows.rows.tolist() == [3, 0, 0, 2]
    assert rows.unseen.tolist() == [False, False, False, True]
    codes = factorize([part([3, 1, None, 2])], "c")
    rows = to_given(codes, train, 4, "c", np.arange(4))
    assert rows.rows.tolist() == [3, 1, 0, 2]
    assert rows.unseen.tolist() == [False, False, False, True]
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
    assert offsets.tolist() == [0, 2, 2, 2, 4, 6]
    assert decoded(codes) == ["a", "b", "b", "c", "a", "b"]


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
    assert decoded(codes) == [*expected, "z"]
    assert offsets.tolist() == [0, len(expected), len(expected) + 1]


def test_a_missing_element_of_a_list_is_a_missing_value():
    offsets, codes = split_values([part([[1, None], [2]])], "g", "|")
    assert offsets.tolist() == [0, 2, 3]
    assert decoded(codes) == ["1", None, "2"]


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
