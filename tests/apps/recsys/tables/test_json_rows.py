"""Rows as JSON: each column's schema by its role, and the same table as from a file."""

from __future__ import annotations

from functools import partial

import jsonschema_rs
import pyarrow as pa
import pytest

from apps.recsys.encoding.features import (
    CategoricalFeature,
    ContinuousFeature,
    Features,
    SequenceFeature,
    VectorFeature,
)
from apps.recsys.encoding.table_encoding import Encoding
from apps.recsys.encoding.timestamps import to_seconds
from apps.recsys.encoding.vocabulary import Vocabulary
from apps.recsys.row import Row
from apps.task.task import item_of, read_item

FEATURES = Features(
    categorical=(
        CategoricalFeature("city", 3),
        CategoricalFeature("row", 10),
        CategoricalFeature("tags", 100, multi_valued=True, hashed=True),
        CategoricalFeature("at_hour", 25),
        CategoricalFeature("at_weekday", 8),
    ),
    continuous=(ContinuousFeature("age", quantiles=(20.0, 30.0, 40.0)), ContinuousFeature("at_days")),
    vectors=(VectorFeature("seen", 2),),
    sequences=(SequenceFeature("visited", 3, 5, items="city"),),
)
CITIES = Vocabulary.of(pa.array(["Oslo", "Rome"]))
ENCODING = Encoding(FEATURES, {"city": CITIES}, "shop", Vocabulary.of(pa.array(["de", "fr"])), timestamps={"at": None})
ROWS = Row.of(ENCODING)
SCHEMA = item_of(ROWS.columns, "Row", "A row.", takes_others=True)
ROW = {
    "shop": "fr",
    "city": "Rome",
    "row": 1,
    "tags": ["a value"],
    "seen": [0.0, 0.0],
    "visited": ["Oslo"],
    "at": "2024-05-31 12:00",
    "age": 30.0,
}


def test_the_example_is_a_row_of_the_schema():
    (example,) = SCHEMA["examples"]
    assert example == {**ROW, "shop": "de", "city": "Oslo"}  # the first values, and the median of a number
    assert SCHEMA["required"] == list(ENCODING.roles)
    jsonschema_rs.validate(SCHEMA, ROW)
    jsonschema_rs.validate(SCHEMA, {**dict.fromkeys(ROW), "shop": "de", "label": 1})


@pytest.mark.parametrize(
    "column, value",
    [
        ("shop", None),
        ("shop", "es"),
        ("city", ["Rome"]),
        ("row", 10),
        ("row", "1"),
        ("tags", "a|b"),
        ("seen", [0.0]),
        ("visited", [None]),
        ("at", True),
        ("age", "30"),
        ("age", 1e39),
    ],
)
def test_what_a_column_does_not_take(column, value):
    with pytest.raises(jsonschema_rs.ValidationError):
        jsonschema_rs.validate(SCHEMA, {**ROW, column: value})


def test_rows_become_a_table_whatever_the_types_of_their_values():
    rows = [
        {**ROW, "city": 5, "tags": ["x", 2, True], "at": 0, "age": 10**30},
        {**dict.fromkeys(ROW), "shop": "de", "city": False, "visited": []},
    ]
    read = partial(read_item, ROWS.columns)
    table = ROWS.table([read(row) for row in rows])
    assert table.column_names == list(ENCODING.roles)
    assert table["city"].to_pylist() == ["5", "False"]  # to an encoding a category and its text are the same
    assert table["tags"].to_pylist() == [["x", "2", "True"], None]
    assert table["age"].to_pylist() == [1e30, None]
    assert table["row"].to_pylist() == ["1", None]
    assert to_seconds(table["at"], "at", "the rows")[0] == 0


def test_a_time_that_is_none():
    with pytest.raises(ValueError, match=r"^at='noon': a timestamp is seconds to nanoseconds since 1970, a date, or"):
        read_item(ROWS.columns, {**ROW, "at": "noon"})
