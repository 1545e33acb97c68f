"""A user's table becomes a configuration: what the target means, what each column is, and what is refused."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest

from apps.data.given import GivenData
from apps.recsys.own_data import TARGET, config_for
from apps.recsys.tables.data import TableData

N = 80


def columns(**changed):
    rng = np.random.default_rng(0)
    made = {
        "id": list(range(N)),
        "age.years": rng.integers(20, 70, N).tolist(),
        "city": rng.choice(["Rome", "Oslo", "Lima"], N).tolist(),
        "grade": rng.integers(0, 4, N).tolist(),
        "name": [f"person {i}" for i in range(N)],
        "same": ["x"] * N,
        "bought": ["no", "yes"] * (N // 2),
    }
    return {**made, **changed}


def given(tmp_path, target="bought", kind=None, options=None, **changed):
    path = tmp_path / "t.csv"
    pa.csv.write_csv(pa.table(columns(**changed)), path)
    return GivenData((path,), target, tmp_path / "made", kind, **(options or {}))


def test_columns_have_their_roles_and_the_data_read_them(tmp_path):
    joined = np.datetime64("2024-05-31T12:00:00") + np.arange(N).astype("timedelta64[h]")
    made = config_for(given(tmp_path, joined=joined))
    arguments = made.config["data"]["init_args"]
    table = arguments["table"]
    assert table["categorical"] == ["city", "grade"]
    assert table["timestamps"] == ["joined"]
    assert table["continuous"] == ["age_years"]  # a dot has a meaning in the names of modules
    assert made.notes == (
        "The target is 'bought' = 'yes': 50.0% of 80 rows.",
        "Columns: city, grade (categories); age_years (numbers); joined (times); left out: id, name, same.",
    )
    data = TableData(**arguments, cache_dir=str(tmp_path / "cache"))
    # A quarter of 80 tests, 15 % of the other 60 validates.
    assert data.sizes() == {"train": 51, "val": 9, "test": 20}


def test_columns_are_left_out_and_rows_split_as_asked(tmp_path):
    joined = np.datetime64("2024-05-31T12:00:00") + np.arange(N)[::-1].astype("timedelta64[h]")
    by_time = config_for(given(tmp_path, options={"exclude": ("grade",), "time": "joined"}, joined=joined))
    assert by_time.notes[1:] == (
        "Columns: city (categories); age_years (numbers); joined (times); left out: id, grade, name, same.",
        "Rows are split by time: joined.",
    )
    arguments = by_time.config["data"]["init_args"]
    data = TableData(**arguments, cache_dir=str(tmp_path / "cache"))
    # A time split tests the last rows, which the table has first; days that training lacks are no feature.
    assert data.rows("test")[:].index_B.tolist() == list(range(20))
    assert [f.name for f in data.features.continuous] == ["age_years"]
    by_number = config_for(given(tmp_path, options={"time": "age.years"}))
    assert by_number.config["data"]["init_args"]["table"]["continuous"] == []


def test_a_user_s_rows_fall_on_one_side(tmp_path):
    made = config_for(given(tmp_path, options={"user": "who.is"}, **{"who.is": [f"u{i % 20}" for i in range(N)]}))
    data = TableData(**made.config["data"]["init_args"], cache_dir=str(tmp_path / "cache"))
    users = [set((data.rows(split)[:].index_B % 20).tolist()) for split in ("train", "val", "test")]
    assert sum(map(len, users)) == 20
    assert "who_is" not in [f.name for f in data.features.categorical]


@pytest.mark.parametrize(
    "values, meaning, positives",
    [
        (list(range(N)), "'bought' of at least 39.5", 40),
        ([0] * 50 + [1] * 10 + [2] * 20, "'bought' of at least 1", 30),  # the median is the smallest value
        (["a"] * 40 + ["b"] * 25 + ["c"] * 15, "'bought' = 'a', the most frequent of 3 values", 40),
        ([True, False] * 40, "'bought' = True", 40),
        ([1, 2] * 40, "'bought' = 2", 40),
    ],
)
def test_a_target_becomes_two_classes(tmp_path, values, meaning, positives):
    made = config_for(given(tmp_path, kind="binary", bought=values))
    assert made.notes[0].startswith(f"The target is {meaning}:")
    label = pq.read_table(made.config["data"]["init_args"]["train_file"])[TARGET]
    assert sum(label.to_pylist()) == positives


@pytest.mark.parametrize(
    "values, kind, meaning",
    [
        ([x / 8 for x in range(N)], "regression", "'bought', a number,"),
        (list(range(N)), "regression", "'bought', a number,"),
        ([1, 2, 3, 5] * 20, "ordinal", "'bought', one of 4 levels,"),
        (["a", "b", "c", "d"] * 20, "multiclass", "'bought', one of 4 classes,"),
        (["a", "b"] * 40, "binary", "'bought' = 'b': 50.0%"),
    ],
)
def test_the_kind_of_a_target_is_that_of_its_values(tmp_path, values, kind, meaning):
    made = config_for(given(tmp_path, bought=values))
    assert made.notes[0] == f"The target is {meaning} of 80 rows."
    arguments = made.config["data"]["init_args"]
    assert arguments["table"]["tasks"][TARGET]["kind"] == kind
    target = TableData(**arguments, cache_dir=str(tmp_path / "cache")).features.target_of_task[0]
    assert target.kind == kind


def test_rows_without_a_target_are_left_out(tmp_path):
    made = config_for(given(tmp_path, bought=["no", "yes"] * 35 + [None] * 10))
    assert "10 rows without a target are left out." in made.notes


@pytest.mark.parametrize(
    "target, changed, message",
    [
        (None, {}, "is a table and needs --target, the column to predict: id, age.years, city"),
        ("bougt", {}, r"--target 'bougt' is not a column of .*t.csv; did you mean 'bought'\?"),
        (
            "bought",
            {"options": {"exclude": ("city", "grad")}},
            "--exclude 'grad' is not a column of .*; did you mean 'grade'",
        ),
        ("bought", {"options": {"user": "users"}}, "--user 'users' is not a column of"),
        ("bought", {"options": {"time": "bought"}}, "--time 'bought' is the target"),
        ("same", {}, "--target 'same' is 'x' in every row that has one: there is nothing to learn"),
        ("bought", {"bought": [None] * N}, "--target 'bought' has no value in any of 80 rows: there is nothing"),
        ("bought", {"bought": ["yes"] * 5 + ["no"] * 75}, "5 rows are positive .*, and each class needs 20"),
        (
            "bought",
            {name: ["x"] * N for name in ("age.years", "city", "grade")},
            "has no column to predict 'bought' from",
        ),
    ],
)
def test_refused(tmp_path, target, changed, message):
    with pytest.raises(ValueError, match=message) as error:
        config_for(given(tmp_path, target, **changed))
    assert "\n" not in str(error.value)


def test_a_folder_of_tables_is_one_table_and_another_folder_none(tmp_path):
    folder = tmp_path / "parts"
    folder.mkdir()
    assert config_for(GivenData((folder,), None, tmp_path / "made")) is None
    for part in range(2):
        pq.write_table(pa.table(columns()), folder / f"{part}.parquet")
    made = config_for(GivenData((folder,), "bought", tmp_path / "made"))
    assert made.notes[0].endswith("of 160 rows.")
    (folder / "0.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"holds tables of several kinds \(.csv, .parquet\): name one file"):
        config_for(GivenData((folder,), "bought", tmp_path / "other"))


def test_a_damaged_file_is_named(tmp_path):
    path = tmp_path / "t.parquet"
    path.write_bytes(b"PAR1 and no more")
    with pytest.raises(ValueError, match=r"t.parquet' cannot be read: "):
        config_for(GivenData((path,), "x", tmp_path / "made"))


def test_a_file_of_utf_16_is_read(tmp_path):
    plain = given(tmp_path)
    (file,) = plain.paths
    config = config_for(plain).config
    file.write_bytes(file.read_text().encode("utf-16"))
    assert config_for(GivenData((file,), "bought", tmp_path / "made")).config == config


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_lists_are_multi_valued_columns(tmp_path, suffix):
    tags = [["a", "b"], ["b"]] * (N // 2)
    made = columns(
        tags=tags if suffix == "parquet" else [str(own) for own in tags], place=[[i + 0.25, i + 0.5] for i in range(N)]
    )
    if suffix == "csv":
        made["place"] = [str(own) for own in made["place"]]
        pa.csv.write_csv(pa.table(made), tmp_path / "t.csv")
    else:
        pq.write_table(pa.table(made), tmp_path / "t.parquet")
    config = config_for(GivenData((tmp_path / f"t.{suffix}",), "bought", tmp_path / "made")).config
    arguments = config["data"]["init_args"]
    assert arguments["table"]["multi_valued"] == ["tags"]
    data = TableData(**arguments, cache_dir=str(tmp_path / "cache"))
    assert data.vocabulary("tags") == (None, "b", "a")
