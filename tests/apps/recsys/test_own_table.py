"""A user's table where it is becomes a commented configuration: roles, labels, leaks and warnings."""

from __future__ import annotations

import datetime as dt

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from apps.data.given import GivenData
from apps.recsys.own_table import config_for, number_kind
from apps.recsys.tables.data import TableData

N = 200
TABLE = ("data", "init_args", "table")
BOUGHT = np.random.default_rng(9).permutation([0, 1] * (N // 2))


def columns(**changed):
    rng = np.random.default_rng(0)
    made = {
        "order": list(range(N)),
        "town": rng.choice(["Oslo", "Rome"], N).tolist(),
        "heat": rng.normal(size=N).tolist(),
        "bought": [("no", "yes")[own] for own in BOUGHT],
    }
    return {name: values for name, values in {**made, **changed}.items() if values is not None}


def described(tmp_path, target="bought", more=(), time=None, user=None, **changed):
    path = tmp_path / "t.csv"
    pa.csv.write_csv(pa.table(columns(**changed)), path)
    return config_for(GivenData((path,), target, tmp_path / "x", None, (), time, user, True, more))


def table_of(made):
    return made.config["data"]["init_args"]["table"]


def test_every_role_has_its_place_and_its_reason(tmp_path):
    rng = np.random.default_rng(1)
    made = described(
        tmp_path,
        visits=rng.integers(0, 90, N).tolist(),
        price=rng.gamma(2, 9, N).round(2).tolist(),
        day=[f"{1 + i % 28:02}.06.2024" for i in range(N)],
        tags=["a|b", "b", "a|b|c", "c|a"] * 50,
        same=["x"] * N,
        none=[None] * N,
        size=[*map(str, rng.integers(30, 99, N - 2)), "NA", "NA"],
    )
    table = table_of(made)
    lists = {role: table[role] for role in ("categorical", "multi_valued", "continuous", "timestamps")}
    assert lists == {
        "categorical": ["town"],
        "multi_valued": ["tags"],
        "continuous": ["heat", "visits", "price", "size"],
        "timestamps": ["day"],
    }
    assert table["left_out"] == ["day_hour"]
    assert table["tasks"] == {"bought": {"column": "bought", "positive": ["yes"]}}
    assert table["split"] == {"kind": "random", "val": 0.15, "test": 0.25, "stratify": "bought"}
    comments = {keys[-1]: text for keys, text in made.comments.items()}
    assert comments["town"] == "category, 2 texts, such as 'Rome'"
    assert comments["tags"] == "list, 3 values between '|', 2.0 per row"
    assert comments["visits"].startswith("count, integers, 0 to 89")
    assert comments["price"].startswith("money, ")
    assert comments["heat"].startswith("number, ")
    assert comments["size"].endswith("30 to 98, 1% missing")  # 2 of 200
    assert comments["day"] == "date, 2024-06-01 to 2024-06-28"
    assert comments["bought"] == "binary, 'yes' in 50.0%"
    assert made.above[*TABLE, "tasks"][1:] == (
        "  order: id, it counts the rows",
        "  same: 'x' in every row",
        "  none: no value in any row",
    )
    assert made.warnings == (
        "order is left out: id, it counts the rows",
        "same is left out: 'x' in every row",
        "none is left out: no value in any row",
    )
    assert made.config["model"]["init_args"]["dense"] == {"kind": "quantile_normal", "num_bins": 32}
    data = TableData(**made.config["data"]["init_args"], cache_dir=str(tmp_path / "cache"))
    assert data.sizes() == {"train": 128, "val": 22, "test": 50}  # 15 % of 150 is 22.5


def test_leaks_are_left_out(tmp_path):
    made = described(
        tmp_path,
        copy=(BOUGHT * 10 + 5.5).tolist(),
        state=["open" if own else "shut" for own in BOUGHT],
        paid=[i * 7 % 30 if own and i % 4 == 1 else None for i, own in enumerate(BOUGHT)],
        spent=[i % 90 + 0.5 if own and i % 4 == 3 else 0.0 for i, own in enumerate(BOUGHT)],
        lucky=[i % 9 if i % 3 else None for i in range(N)],
    )
    assert [line for line in made.warnings if "leak" in line] == [
        f"{column} is left out: a leak? It {what} (put it back if it is known before the label)"
        for column, what in (
            ("copy", "alone predicts bought with AUC 1.0000"),
            ("state", "alone predicts bought with AUC 1.0000"),
            ("paid", "is filled only where bought is positive"),
            ("spent", "is other than 0 only where bought is positive"),
        )
    ]
    assert "lucky" in table_of(made)["categorical"]


def test_leaks_of_a_number(tmp_path):
    spent = np.random.default_rng(0).gamma(1, 30, N)
    made = described(
        tmp_path, "spent", spent=spent.tolist(), euros=(2 * spent + 1).tolist(), much=(spent > 20).tolist()
    )
    found = {line.split(" is ")[0]: line for line in made.warnings}
    assert "alone predicts spent with R2 1.0000" in found["euros"]
    assert "alone tells small spent from large, AUC 1.0000" in found["much"]
    assert table_of(made)["categorical"] == ["town", "bought"]


def test_several_targets_and_a_split_by_time(tmp_path):
    day = [str(dt.date(2024, 1, 1) + dt.timedelta(i)) for i in range(N)]
    spent = [0.0 if i % 3 else i + 0.5 for i in range(N)]
    made = described(tmp_path, "bought", ("spent",), "day", "who", day=day, spent=spent, who=[*"abcdefgh"] * 25)
    table = table_of(made)
    assert table["tasks"]["spent"] == {"column": "spent", "kind": "revenue"}
    assert made.comments[*TABLE, "tasks", "spent"] == "revenue, 0 to 198.5, 66% zeros"  # 133 of 200
    assert (table["time"], table["user"], table["split"]["kind"]) == ("day", "who", "time")
    assert table["left_out"] == ["day_hour", "day_days"]
    assert made.above[*TABLE, "split", "val"][0].startswith("gap: 90d")
    assert "who" in table["categorical"]
    by_user = table_of(described(tmp_path, user="who", who=[*"abcdefgh"] * 25))
    assert by_user["split"]["kind"] == "user"
    assert by_user["categorical"] == ["town"]


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ([0.0, 1.5, 900.0] * 9, "revenue"),  # a third are zeros
        ([0, 0, 0, 1, 2, 900] * 9, "revenue"),
        ([0, *range(1, 90)], "count"),  # 1 % zeros
        ([0, 1, 2, 3] * 9, "count"),  # not skewed
        ([0, 0, -1.5], "regression"),
        ([1000, 2000, 900_000], "regression"),
    ],
)
def test_kinds_of_numbers(values, kind):
    assert number_kind(np.array(values, float)) == kind


def test_labels_in_words(tmp_path):
    def label(values):
        made = described(tmp_path, bought=values)
        return table_of(made)["tasks"]["bought"], made.comments[*TABLE, "tasks", "bought"]

    assert label([0, 1, 1, 1] * 50) == ({"column": "bought"}, "binary, 1 in 75.0%")
    assert label([True, False] * 100) == ({"column": "bought"}, "binary, True in 50.0%")
    assert label(["0", "1", "NA", "1"] * 50) == ({"column": "bought"}, "binary, 1.0 in 66.7%, 50 rows without")
    assert label([1, 2] * 100) == ({"column": "bought", "at_least": 2}, "binary, 2 in 50.0%")
    three = label(["a", "b", "b", "c"] * 50)
    assert three == ({"column": "bought", "kind": "multiclass"}, "multiclass, 3 classes, most often 'b'")
    assert label([1, 2, 3, 4] * 50) == ({"column": "bought", "kind": "ordinal"}, "ordinal, 1 to 4, 0% zeros")


@pytest.mark.parametrize(
    ("changed", "target", "why"),
    [
        ({"label": [0, 1] * 100}, "label", "by its name"),
        ({}, "bought", "by its name and its two values"),
        ({"clicked": [0, 1] * 100}, "bought", "by its name and its two values; also likely: clicked"),
        ({"bought": None, "zone": [0, 1] * 100}, "zone", "the last column, of two values"),
        ({"bought": None}, "town", "the only column of two values"),
        (
            {"bought": None, "town": None, "sale_price": [i % 70 + 0.5 for i in range(N)]},
            "sale_price",
            "the last column, by its name",
        ),
    ],
)
def test_the_likeliest_target(tmp_path, changed, target, why):
    made = described(tmp_path, None, **changed)
    assert list(table_of(made)["tasks"]) == [target]
    assert made.notes[0] == f"target: {target}, {why}; --target names another one"


def test_dates_in_the_future_and_in_two_files(tmp_path):
    folder = tmp_path / "parts"
    folder.mkdir()
    for name, first in (("a", dt.date(2024, 1, 1)), ("b", dt.date(2024, 1, 31)), ("c", dt.date(2099, 1, 1))):
        days = [first + dt.timedelta(i % 40) for i in range(N)]
        pq.write_table(
            pa.table(columns(day=days, place=[[i + 0.5, 1.0] for i in range(N)])), folder / f"{name}.parquet"
        )
    made = config_for(GivenData((folder,), "bought", tmp_path / "x", in_place=True))
    assert made.warnings[:2] == (
        "day is in the future in 200 rows, up to 2099-02-09",
        "day of a.parquet and b.parquet overlaps, 2024-01-31 to 2024-02-09: is it one time after another?",
    )
    assert table_of(made)["vectors"] == ["place"]
    assert made.config["data"]["init_args"]["train_file"] == str(folder / "*.parquet")
    data = TableData(**made.config["data"]["init_args"], cache_dir=str(tmp_path / "cache"))
    assert sum(data.sizes().values()) == 3 * N


def test_one_separator_a_table(tmp_path):
    made = described(tmp_path, tags=["a;b", "b", "a;b;c", "c;a"] * 50)
    assert table_of(made)["separator"] == ";"
    made = described(tmp_path, tags=["a;b", "b", "a;b;c", "c;a"] * 50, kinds=["a|b", "b", "a|b|c", "c|a"] * 50)
    assert "kinds is left out: lists with '|', and a table has one separator, here ';'" in made.warnings[-1]


def test_columns_that_cannot_be_features(tmp_path):
    made = described(
        tmp_path, about=[f"a red hat, {i}" for i in range(N)], **{"age.years": [i * 7 % 50 for i in range(N)]}
    )
    assert made.warnings[-2:] == (
        made.warnings[-2],
        "age.years is left out: its name (a name takes no dot and no slash)",
    )
    assert made.warnings[-2].startswith("about is left out: text of 4 words per row")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"target": None, "bought": None, "town": None}, "has no column that is plainly the label: give --target, one"),
        ({"target": "bougt"}, r"--target 'bougt' is not a column of .*; did you mean 'bought'\?"),
        ({"target": "bought", "more": ("hat",)}, "--target 'hat' is not a column of"),
        ({"time": "bought"}, "--time 'bought' is the target"),
        ({"time": "days"}, "--time 'days' is not a column of"),
        ({"time": "town"}, "must hold numbers: row 0 holds 'Rome'; times are numbers, or dates"),
        ({"bought": ["yes"] * N}, "--target 'bought' is 'yes' in every row that has one: there is nothing to learn"),
        ({"bought": ["yes"] * 5 + ["no"] * 195}, "5 rows are positive .*, and each class needs 20"),
        ({"town": None, "heat": None}, "has no column to predict 'bought' from: order left out"),
    ],
)
def test_refused(tmp_path, changed, message):
    with pytest.raises(ValueError, match=message) as error:
        described(tmp_path, **changed)
    assert "\n" not in str(error.value)
