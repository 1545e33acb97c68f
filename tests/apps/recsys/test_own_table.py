"""A user's table where it is becomes a commented configuration: roles, labels, leaks and warnings."""

import datetime as dt

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from refusals import refused

from apps.data.given import GivenData
from apps.recsys.own_labels import number_kind
from apps.recsys.own_table import config_for
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


def described(
    tmp_path,
    target="bought",
    more=(),
    time=None,
    user=None,
    kind=None,
    exclude=(),
    is_read=True,
    suffix="csv",
    **changed,
):
    path = tmp_path / f"t.{suffix}"
    (pa.csv.write_csv if suffix == "csv" else pq.write_table)(pa.table(columns(**changed)), path)
    made = config_for(GivenData((path,), target, tmp_path / "x", kind, exclude, time, user, is_read, more))
    assert not (tmp_path / "x").exists()  # the table is read where it is
    return made


def data_of(made, tmp_path):
    return TableData(**made.config["data"]["init_args"], cache_dir=str(tmp_path / "cache"))


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
    assert (comments["day"], comments["bought"]) == ("date, 2024-06-01 to 2024-06-28", "binary, 'yes' in 50.0%")
    assert made.above[*TABLE, "tasks"][1:] == (
        "  order: id, it counts the rows", "  same: 'x' in every row", "  none: no value in any row",
    )  # fmt: skip
    assert made.warnings == (
        "order is left out: id, it counts the rows",
        "same is left out: 'x' in every row",
        "none is left out: no value in any row",
    )
    assert made.config["model"]["init_args"]["dense"] == {"kind": "by_label"}
    assert table["numbers"] == "auto"
    data = data_of(made, tmp_path)
    assert data.sizes() == {"train": 128, "val": 22, "test": 50}  # 15 % of 150 is 22.5


def test_leaks_are_left_out_those_of_a_number_too(tmp_path):
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
    spent = np.random.default_rng(0).gamma(1, 30, N)
    made = described(
        tmp_path, "spent", spent=spent.tolist(), euros=(2 * spent + 1).tolist(), much=(spent > 20).tolist()
    )
    found = {line.split(" is ")[0]: line for line in made.warnings}
    assert "alone predicts spent with R2 1.0000" in found["euros"]
    assert "alone tells small spent from large, AUC 1.0000" in found["much"]
    assert table_of(made)["categorical"] == ["town"]
    # Another label's name and two values, though it says nothing of this one.
    assert "left out: likely another label (--target bought makes it one; else put it back" in found["bought"]


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
    assert made.verdict == ("--target", "bought", "--target", "spent", "--time", "day", "--user", "who")
    by_user = table_of(described(tmp_path, user="who", who=[*"abcdefgh"] * 25))
    assert (by_user["split"]["kind"], by_user["categorical"]) == ("user", ["town"])


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
        ({"bought": None, "town": None, "sale_price": [i % 70 + 0.5 for i in range(N)]}, "sale_price",
         "the last column, by its name"),
    ],
)  # fmt: skip
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
    data = data_of(made, tmp_path)
    assert sum(data.sizes().values()) == 3 * N


def test_one_separator_a_table_and_texts_need_an_encoder(tmp_path):
    made = described(tmp_path, tags=["a;b", "b", "a;b;c", "c;a"] * 50)
    assert table_of(made)["separator"] == ";"
    made = described(tmp_path, tags=["a;b", "b", "a;b;c", "c;a"] * 50, kinds=["a|b", "b", "a|b|c", "c|a"] * 50)
    assert "kinds is left out: lists with '|', and a table has one separator, here ';'" in made.warnings[-1]
    made = described(tmp_path, about=[f"a red hat, {i}" for i in range(N)])
    assert made.warnings[-1].startswith("about is left out: text of 4 words per row")


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_names_with_dots_and_slashes_are_read_with_underscores(tmp_path, suffix):
    age, home = [i * 7 % 50 for i in range(N)], ["Oslo", "Rome"] * (N // 2)
    also = {"is.new": [own == 1 for own in BOUGHT], "a.b": home, "a/b": age}
    made = described(tmp_path, "is.new", suffix=suffix, bought=None, **{"age.years": age, "home/town": home}, **also)
    table = table_of(made)
    assert (table["continuous"], table["categorical"]) == (["heat", "age_years"], ["town", "home_town"])
    assert table["tasks"] == {"is_new": {"column": "is.new"}}
    advice = "its name (a name takes no dot and no slash, and with _ it is another column's)"
    assert made.warnings[1:] == (f"a.b is left out: {advice}", f"a/b is left out: {advice}")
    data = data_of(made, tmp_path)
    rows = data.rows("train")[:]
    assert {*data.vocabulary("home_town")} == {None, "Oslo", "Rome"}
    index = rows.index_B.tolist()
    assert rows.label_Bt[:, 0].tolist() == [float(BOUGHT[i]) for i in index]
    place = [f.name for f in data.features.continuous].index("age_years")
    assert rows.dense_BC[:, place].tolist() == [float(age[i]) for i in index]


def test_options_name_columns_as_the_file_does_and_a_user_s_rows_fall_on_one_side(tmp_path):
    day = [str(dt.date(2024, 1, 1) + dt.timedelta(i)) for i in range(N)][::-1]
    changed = {"ship.day": day, "who.is": [f"u{i % 20}" for i in range(N)], "a.size": [i % 30 for i in range(N)]}
    made = described(tmp_path, time="ship.day", user="who.is", exclude=("a.size", "town"), **changed)
    table = table_of(made)
    assert (table["time"], table["user"], table["categorical"], table["continuous"]) == (
        "ship_day", "who_is", ["who_is"], ["heat"],
    )  # fmt: skip
    assert [line for line in made.warnings if "size" in line or "town" in line] == []  # who excludes it knows
    # A time split tests the last rows, which the table has first.
    assert data_of(made, tmp_path).rows("test")[:].index_B.tolist() == list(range(50))
    made = described(tmp_path, user="who.is", **{"who.is": [f"u{i % 20}" for i in range(N)]})
    data = data_of(made, tmp_path)
    users = [set((data.rows(split)[:].index_B % 20).tolist()) for split in ("train", "val", "test")]
    assert sum(map(len, users)) == 20
    assert "who_is" not in [f.name for f in data.features.categorical]


@pytest.mark.parametrize(
    ("values", "config", "meaning", "positives"),
    [
        (list(range(N)), {"at_least": 99.5}, "at least 99.5 in 50.0%", 100),
        ([0] * 125 + [1] * 25 + [2] * 50, {"at_least": 1.0}, "at least 1 in 37.5%", 75),  # the median is the smallest
        (
            ["a"] * 100 + ["b"] * 60 + ["c"] * 40,
            {"positive": ["a"]},
            "'a', the most frequent of 3 values, in 50.0%",
            100,
        ),
        ([True, False] * 100, {}, "True in 50.0%", 100),
        ([1, 2] * 100, {"at_least": 2}, "2 in 50.0%", 100),
        (["no ", " yes"] * 100, {"positive": ["yes"]}, "'yes' in 50.0%", 100),
    ],
)
@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_any_target_becomes_two_classes(tmp_path, suffix, values, config, meaning, positives):
    order = np.random.default_rng(0).permutation(N)
    made = described(tmp_path, kind="binary", suffix=suffix, bought=[values[i] for i in order])
    assert table_of(made)["tasks"] == {"bought": {"column": "bought", **config}}
    assert made.comments[*TABLE, "tasks", "bought"] == f"binary, {meaning}"
    data = data_of(made, tmp_path)
    assert sum(data.rows(split)[:].label_Bt.sum().item() for split in ("train", "val", "test")) == positives


@pytest.mark.parametrize(
    ("values", "kind", "found"),
    [([x / 8 for x in range(N)], None, "regression"), ([1, 2, 3, 5] * 50, None, "ordinal"),
     ([1, 2, 3, 5] * 50, "regression", "regression"), ([1, 2, 3, 5] * 50, "multiclass", "multiclass"),
     ([1, 2] * 100, "regression", "regression"), ([0, 2.5, 0, 1.5] * 50, None, "revenue"),
     ([0, 0, 0, 1.5] * 50, "tweedie", "tweedie"), (["a", "b", "c", "d"] * 50, None, "multiclass"),
     (["a", "b"] * 100, "multiclass", "multiclass")],
)  # fmt: skip
def test_the_kind_of_a_target_is_as_asked_or_that_of_its_values(tmp_path, values, kind, found):
    made = described(tmp_path, kind=kind, bought=values)
    assert data_of(made, tmp_path).features.target_of_task[0].kind == found


def test_a_configuration_names_its_columns_and_rows_without_a_target(tmp_path):
    made = described(tmp_path, bought=[*(["no", "yes"] * 80), *[None] * 40])
    assert made.notes == ("200 rows; bought: binary, 'yes' in 50.0%, 40 rows without",)
    labels = [label for split in ("train", "val", "test") for label in data_of(made, tmp_path).rows(split)[:].label_Bt]
    assert [sum(own.item() == value for own in labels) for value in (0, 1)] == [80, 80]
    made = described(tmp_path, is_read=False, visits=[i * 7 % 90 for i in range(N)])
    assert made.notes == (
        "200 rows; bought: binary, 'yes' in 50.0%",
        "columns: town (categorical); heat, visits (continuous)",
    )
    assert made.config["model"]["init_args"]["shared"]["class_path"] == "core.MMoE"  # what a verdict asks about
    assert made.warnings == ("order is left out: id, it counts the rows",)


def test_a_file_of_utf_16_is_read_and_no_folder_of_other_files_or_damaged_file(tmp_path):
    config = described(tmp_path).config
    file = tmp_path / "t.csv"
    file.write_bytes(file.read_text().encode("utf-16"))
    made = config_for(GivenData((file,), "bought", tmp_path / "x", in_place=True))
    assert (made.config, sum(data_of(made, tmp_path).sizes().values())) == (config, N)
    folder = tmp_path / "parts [2024]"  # brackets are no pattern
    folder.mkdir()
    assert config_for(GivenData((folder,), None, tmp_path / "x")) is None
    for part in range(2):
        pq.write_table(pa.table(columns()), folder / f"{part}.parquet")
    made = config_for(GivenData((folder,), "bought", tmp_path / "x"))
    assert sum(data_of(made, tmp_path).sizes().values()) == 2 * N
    (folder / "0.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"holds tables of several kinds \(.csv, .parquet\): name one file"):
        config_for(GivenData((folder,), "bought", tmp_path / "x"))
    path = tmp_path / "t.parquet"
    path.write_bytes(b"PAR1 and no more")
    refused(r"t.parquet' cannot be read: ", lambda: config_for(GivenData((path,), "x", tmp_path / "x")))
    (tmp_path / "t.csv").write_text("a,b,a\n1,2,3\n")
    with pytest.raises(ValueError, match=r"column 'a' is twice in '.*t.csv'"):
        config_for(GivenData((tmp_path / "t.csv",), "b", tmp_path / "x"))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"target": None, "bought": None, "town": None}, "has no column that is plainly the label: give --target, one"),
        ({"target": None, "is_read": False},
         "is a table and needs --target, the column to predict: order, town, heat, bou"),
        ({"target": "bougt"}, r"--target 'bougt' is not a column of .*; did you mean 'bought'\?"),
        ({"target": "bought", "more": ("hat",)}, "--target 'hat' is not a column of"),
        ({"exclude": ("town", "heaat")}, r"--exclude 'heaat' is not a column of .*; did you mean 'heat'\?"),
        ({"user": "users"}, "--user 'users' is not a column of"),
        ({"time": "bought"}, "--time 'bought' is the target"),
        ({"time": "days"}, "--time 'days' is not a column of"),
        ({"time": "town"}, "must hold numbers: row 0 holds 'Rome'; times are numbers, or dates"),
        ({"bought": ["yes"] * N}, "--target 'bought' is 'yes' in every row that has one: there is nothing to learn"),
        ({"bought": [None] * N}, "--target 'bought' has no value in any of 200 rows: there is nothing"),
        ({"bought": ["yes"] * 5 + ["no"] * 195}, "5 rows are positive .*, and each class needs 20"),
        ({"bought": ["a", "b"] * 100, "kind": "regression"}, "holds string, and kind 'regression' takes numbers"),
        ({"bought": [f"v{i}" for i in range(N)]}, "0 of 200 classes have 20 rows, and two are needed"),
        ({"bought": [0.5 * i for i in range(9)] + [None] * 191}, "has a number in 9 rows, and 40 are needed"),
        ({"exclude": ("town", "heat")}, "has no column to predict 'bought' from: order, town, heat left out"),
        ({"town": None, "heat": None}, "has no column to predict 'bought' from: order left out"),
    ],
)  # fmt: skip
def test_refused(tmp_path, changed, message):
    with pytest.raises(ValueError, match=message) as error:
        described(tmp_path, **changed)
    assert "\n" not in str(error.value)
