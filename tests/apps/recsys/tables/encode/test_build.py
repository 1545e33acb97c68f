"""Building a table: its splits, what is reported of it, what is refused."""

import gzip
import os
from pathlib import Path

import pyarrow as pa
import pytest
from own_table import TRAIN, changed, config_of, write
from refusals import refused

from apps.recsys.readers import user_tables
from apps.recsys.schema import SplitConfig, TaskConfig


def test_a_split_by_user_keeps_users_together_and_reports_those_of_given_files(own, tmp_path, caplog):
    config = config_of(user="user", split=SplitConfig("user", val=0.34, test=0.34))
    train = {"user": [1, 1, 2, 2, 3, 3], "click": [1, 0, 1, 0, 1, 0], "city": list("abcabc")}
    write(tmp_path, train=train, test={"user": [1, 4], "click": [1, 0], "city": ["a", "a"]})
    alone = own(config, test_file=None)
    users = [set(alone.rows(s)[:].group_B.tolist()) for s in ("train", "val", "test")]
    assert [len(u) for u in users] == [1, 1, 1]
    assert len(set.union(*users)) == 3
    assert not any("the split is by user" in w for w in alone.findings.warnings)
    # That training lacks the users of the test is what the split is for.
    other = own(config_of(categorical=("city", "user"), user="user", split=config.split), test_file=None)
    assert other.findings.unseen["user"]["test"] == 1
    assert not any("are they written alike" in w for w in other.findings.warnings)
    # Both users 1 and 4 test; if user 1 also trains, that is one of two.
    given = own(config_of(user="user", split=SplitConfig("user", val=0)))
    assert "1 of 2 users of test are in train too, although the split is by user" in given.findings.warnings
    given.setup()
    assert "1 of 2 users of test" in caplog.text


def test_a_time_that_is_a_category_too_is_read_as_text_like_rows_to_predict(own, tmp_path):
    months = {"month": ["02", "01", "01", "02", "03", "02"], "click": [0, 1, 0, 1, 0, 1]}
    pa.csv.write_csv(pa.table(months), tmp_path / "train.csv")
    config = config_of(categorical=("month",), time="month", split=SplitConfig("time", val=0, test=0.2))
    data = own(config, test_file=None)
    assert (data.vocabulary("month"), data.opened["test"].tolist()) == ((None, "02", "01"), [4])


def test_an_id_of_the_rows_is_one_warning_of_the_training(own, tmp_path, caplog):
    # 200 orders, of which the last row repeats the first; 180 train by time. Of 180 prices 180 are distinct as well.
    rows = {
        "order": [*(f"o{i}" for i in range(199)), "o0"], "city": ["Rome", "Oslo"] * 100, "price": list(range(200)),
        "click": [0, 1, 1, 0] * 50,
    }  # fmt: skip
    roles = {"categorical": ("order", "city"), "continuous": ("price",), "time": "price"}
    config = config_of(**roles, split=SplitConfig("time", val=0, test=0.1))
    pa.csv.write_csv(pa.table(rows), tmp_path / "train.csv")
    data = own(config, test_file=None)
    warning = (
        "column 'order' looks like an id of the rows: 100 % of its 180 training values are distinct. It says nothing "
        "of new rows: leave it out (exclude: [order])"
    )
    # That the orders of the test are not in training is no further one; the price is the time, which grows.
    assert [w for w in data.findings.warnings if "column 'price'" not in w] == [warning]
    data.setup("predict")
    assert warning not in caplog.text
    data.setup("fit")
    data.setup("validate")
    assert caplog.text.count(warning) == 1
    assert not any("'order'" in w for w in own(config, test_file=None, exclude=["order"]).findings.warnings)
    pa.csv.write_csv(pa.table(rows).slice(0, 100), tmp_path / "train.csv")  # 90 rows that train
    assert not any("looks like an id" in w for w in own(config, test_file=None).findings.warnings)


def test_features_without_a_value_or_with_the_labels_are_reported(own, tmp_path):
    pa.csv.write_csv(pa.table(changed(age=[""] * 6)), tmp_path / "train.csv")
    assert "column 'age' has no value in any training row: leave it out (exclude: [age])" in own().findings.warnings
    tags = ["x|won", "lost|y", "won|x", "y|lost", "y|lost", "x|won"]
    write(tmp_path, train=changed(city=["y", "n", "y", "n", "n", "y"], age=["1", "0", "1", "0", "0", "1"], tags=tags))
    warnings = own(config_of(continuous=("age",), multi_valued=("tags",))).findings.warnings
    assert [w.partition(" in every")[0] for w in warnings if "determines" in w] == [
        "column 'city' determines the label of task 'click'",
        "column 'tags' determines the label of task 'click'",
        "column 'age' determines the label of task 'click'",
    ]


def test_a_folder_and_the_bytes_of_another_format_are_named_in_a_line_of_text(own, tmp_path):
    (tmp_path / "parts.csv").mkdir()
    with pytest.raises(ValueError, match=r"^train_file='parts\.csv' is a folder: name a file in it, or several as"):
        _ = own(train_file="parts.csv").features
    (tmp_path / "train.csv").write_bytes(b"city\x1b[31m\n" + b"\x1b]0;x\x07," * 500)
    with pytest.raises(ValueError, match=r"train\.csv' cannot be read: ") as error:
        _ = own().features
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 200 + len(str(tmp_path)) + 50


@pytest.mark.parametrize(
    ("train", "config", "message"),
    [
        (TRAIN, config_of(categorical=("citty",)), r"column 'citty' \(categorical\) is not in .*; did you mean 'city'"),
        (TRAIN, config_of(tasks={"c": TaskConfig("clicks")}), r"'clicks' \(task c\) is not in .*did you mean 'click'"),
        (changed(click=[1] * 6), config_of(), "task 'click' has positive labels alone in the train split"),
        (changed(click=[0] * 6), config_of(), "task 'click' has no positive label in the train split"),
        (changed(stars=[""] * 6), config_of(tasks={"l": TaskConfig("stars", at_least=4)}),
         "task 'l' has no label in the train split"),
        (changed(age=["1", "2", "old", "3", "?", "4"]), config_of(continuous=("age",)),
         "column 'age' of the training table must hold numbers: row 2 holds 'old'; leave missing numbers empty"),
        (TRAIN, config_of(num_rows={"city": 5}), "column 'city' holds 'Rome' in row 0: num_rows=5 takes row numbers"),
        (TRAIN, config_of(categorical=("user",), num_rows={"user": 9}),
         "column 'user' holds '9' in row 7: num_rows=9 takes row numbers 0 to 8"),
        (changed(shop=["de"] * 6), config_of(domain="shop"), "names the domain, but holds 'fr', which training lacks,"),
        (changed(shop=["de", "fr", "", "fr", "de", "de"]), config_of(domain="shop"), "holds no value in row 2"),
        (changed(user=["1", "", "2", "2", "3", "3"]), config_of(user="user"),
         "column 'user' names the users, but has no value in row 1"),
        (changed(stars=["1", "2", "3", "", "5", "6"]), config_of(time="stars", split=SplitConfig("time")),
         "column 'stars' orders the rows, but has no value in row 3"),
        ({k: [] for k in TRAIN}, config_of(), "the training table has no rows"),
        (TRAIN, config_of(split=SplitConfig("given", val=0.01)), "the validation split is empty"),
    ],
)  # fmt: skip
def test_a_table_that_does_not_fit_its_description_is_refused_in_one_line(own, tmp_path, train, config, message):
    write(tmp_path, train=train)
    with pytest.raises(ValueError, match=message) as error:
        _ = own(config).features
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "cache" / "tables").glob("*")) + list((tmp_path / "cache" / "tables").glob(".*"))


def test_files_that_cannot_be_read_are_named(own, tmp_path):
    write(tmp_path, "parquet")
    os.truncate(tmp_path / "train.parquet", 100)
    with pytest.raises(ValueError, match=r"train\.parquet' cannot be read: ") as error:
        _ = own(kind="parquet").features
    assert "\n" not in str(error.value)
    lines = (tmp_path / "train.csv").read_text().splitlines()
    (tmp_path / "train.csv").write_text("\n".join([*lines[:3], lines[3][:9]]))
    with pytest.raises(ValueError, match=r"train\.csv' cannot be read: .*Row #4: Expected 8 columns") as error:
        _ = own().features
    assert "\n" not in str(error.value)
    (tmp_path / "cut.csv.gz").write_bytes(gzip.compress((tmp_path / "test.csv").read_bytes())[:60])
    refused(r"cut\.csv\.gz' cannot be read: Truncated compressed stream", lambda: own(train_file="cut.csv.gz").features)
    (tmp_path / "train.csv").write_text("")
    refused(r"train\.csv' cannot be read: Empty CSV file", lambda: own().features)
    with pytest.raises(ValueError, match=r"train_file='trian.csv': no such file in .*; did you mean 'train.csv'"):
        _ = own(train_file="trian.csv").features
    (tmp_path / "train.csv").write_text((tmp_path / "test.csv").read_text().replace(",", ";"))
    refused(r"is not in .*, whose one column is 'city;\"tags\".*': is it separated by ','\?$", lambda: own().features)
    (tmp_path / "train.txt").touch()
    refused(r"train_file='train.txt' is no .parquet, .csv or .tsv", lambda: own(train_file="train.txt").features)
    header = (tmp_path / "test.csv").read_text().splitlines()[0].replace("other", "city")
    (tmp_path / "train.csv").write_text(header + "\na,b,1,2,c,1,1,x\n")
    refused("column 'city' is twice in ", lambda: own().features)


@pytest.mark.parametrize("codec", ["gzip", "bz2", "zstd", "lz4"])
def test_text_that_unpacks_to_far_more_than_its_file_is_refused(tmp_path, monkeypatch, codec):
    monkeypatch.setattr("apps.base.inflate.Inflated.__init__.__defaults__", (1 << 16, 50))
    ending = {"gzip": "gz", "bz2": "bz2", "zstd": "zst", "lz4": "lz4"}[codec]
    path = tmp_path / f"t.csv.{ending}"

    def written(rows: int) -> Path:
        with pa.CompressedOutputStream(str(path), codec) as file:
            file.write(b"age,city\n" + b"20,Rome\n" * rows)
        return path

    roles = {"age": "continuous", "city": "categorical"}
    assert len(user_tables.read_columns(written(1000), roles, ("age",))) == 1000  # 8 KB: all is read
    with pytest.raises(ValueError, match=rf"^t\.csv\.{ending} is compressed over \d+ times") as error:
        user_tables.read_columns(written(100_000), roles, ("age",))  # 800 KB
    assert "\n" not in str(error.value)


def test_parquet_of_far_more_than_its_file_is_refused_and_a_text_it_repeats_is_in_memory_once(tmp_path, monkeypatch):
    texts = pa.table({"city": pa.array(["Rome" * 25_000, "Oslo"]).take(pa.array([0] * 999 + [1]))})
    pa.parquet.write_table(texts, tmp_path / "t.parquet")
    table = user_tables.read_columns(tmp_path / "t.parquet", {"city": "categorical"})
    assert table.nbytes < 200_000  # 100,000 bytes once, and not 999 times
    assert table["city"].to_pylist()[998:] == ["Rome" * 25_000, "Oslo"]
    monkeypatch.setattr("apps.base.inflate.FREE", 1 << 20)
    pa.parquet.write_table(pa.table({"age": pa.array([7] * 1_000_000, pa.int32())}), tmp_path / "t.parquet")
    # 1,000,000 rows of 4 bytes, in a run that takes some hundred
    with pytest.raises(ValueError, match=r"^t\.parquet holds over 4,000,000 bytes of rows in [\d,]+ bytes: no data"):
        user_tables.read_columns(tmp_path / "t.parquet", {"age": "continuous"})


@pytest.mark.parametrize("numbers", [("age",), ()], ids=["beside a text among numbers", "alone"])
def test_text_of_another_encoding_is_named_with_its_row(tmp_path, numbers):
    (tmp_path / "t.csv").write_bytes("user,age,city\n1,x,Rome\n2,3,Zürich\n".encode("latin1"))
    with pytest.raises(
        ValueError, match=r"t\.csv' cannot be read: column 'city' holds b'Z\\xfcrich' in row 1, which is no"
    ):
        user_tables.read_columns(tmp_path / "t.csv", dict.fromkeys(("user", "age", "city"), "categorical"), numbers)
    (tmp_path / "t.csv").write_bytes("straße,user\n1,2\n".encode("latin1"))
    with pytest.raises(ValueError, match=r"t\.csv' cannot be read: the names of its columns are no UTF-8 text"):
        user_tables.read_columns(tmp_path / "t.csv", {"user": "categorical"})


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16-le", "utf-16-be"])
def test_text_with_a_byte_order_mark_is_utf_8_or_utf_16(tmp_path, caplog, encoding):
    mark = "" if encoding == "utf-8-sig" else "\ufeff"
    file, roles = tmp_path / "t.csv", {"straße": "categorical", "age": "continuous"}
    file.write_bytes(f"{mark}straße,age\r\nä,1\r\n".encode(encoding))
    read = user_tables.read_columns(file, roles, ("age",))
    assert read.to_pylist() == [{"straße": "ä", "age": 1.0}]
    assert [piece.to_pylist() for piece in user_tables.iter_columns(file, roles, ("age",))] == [read.to_pylist()]
    with pytest.raises(ValueError, match=r"column 'Straße' \(user\) is not in .*; did you mean 'straße'\?"):
        user_tables.check_columns(file, {"Straße": "user"})
    assert not caplog.messages
    file.write_bytes(f"{mark}straße,age\nä,1".encode(encoding))
    assert user_tables.read_columns(file, roles).num_rows == 1
    assert "does not end in a line end" in caplog.text


def test_a_file_cut_within_its_last_field_is_read_with_a_warning(tmp_path, caplog):
    def ages(name: str, content: bytes) -> list[float]:
        (tmp_path / name).write_bytes(content)
        return user_tables.read_columns(tmp_path / name, {"age": "continuous"}, ("age",))["age"].to_pylist()

    whole = b"user,age\r\n1,20\r\n2,345\r\n"
    assert ages("whole.csv", whole) == [20, 345]
    assert ages("cut.csv.gz", gzip.compress(whole[:-3])) == [20, 34]  # its end is known to be whole
    assert ages("line.csv", whole[:-7]) == [20]  # a cut between two rows cannot be seen
    assert not caplog.messages
    assert ages("cut.csv", whole[:-3]) == [20, 34]
    assert caplog.text.count("cut.csv' does not end in a line end: its last row may be cut") == 1


def test_names_of_splits_are_checked_and_a_domain_that_is_a_feature_has_its_own_words(own, tmp_path):
    data = own()
    refused("split='valid' is not one of train, val, test; did you mean 'val'", lambda: data.rows("valid"))
    with pytest.raises(ValueError, match="vocabulary of column='user' is not one of"):
        data.vocabulary("user")  # hashed: its rows have no values
    ids = {"shop": ["3", "1", "3", "3", "1", "3"]}
    write(tmp_path, train=changed(**ids), test={"click": [1], "shop": ["1"]})
    columns = {"categorical": ("shop",), "domain": "shop"}
    data = own(config_of(**columns))
    assert (data.vocabulary("shop"), data.domain_values) == ((None, "3", "1"), ("3", "1"))
    given = own(config_of(**columns, num_rows={"shop": 5}))
    assert given.domain_values == ("3", "1")
    with pytest.raises(ValueError, match="vocabulary of column='shop' is not one of"):
        given.vocabulary("shop")  # its rows are 3 and 1 themselves
    assert own(config_of(categorical=("shop",))).domain_values == ()


def test_a_split_by_group_and_rows_of_cold_users_and_items(own, tmp_path):
    # Sessions s0 to s9 of three rows; a session's user and item are its number modulo 4 and its row.
    rows = {
        "session": [f"s{i // 3}" for i in range(30)], "user": [f"u{i // 3 % 4}" for i in range(30)],
        "item": ["a", "b", ""] * 9 + ["new", "a", "b"], "city": ["Rome", "Oslo"] * 15, "click": [0, 1, 1] * 10,
    }  # fmt: skip
    pa.csv.write_csv(pa.table(rows), tmp_path / "train.csv")
    split = SplitConfig("group", val=0.25, test=0.2, column="session", seed=1)
    data = own(config_of(split=split, user="user", item="item"), test_file=None)
    in_split = {s: data.rows(s)[:].index_B for s in ("train", "val", "test")}
    sessions = {s: {int(i) // 3 for i in index} for s, index in in_split.items()}
    assert [len(s) for s in sessions.values()] == [6, 2, 2]
    assert len(set.union(*sessions.values())) == 10
    for s, index in in_split.items():
        cold_B = data.rows(s)[:].cold_B
        for i, cold in zip(index.tolist(), [0] * len(index) if cold_B is None else cold_B.tolist(), strict=True):
            known = {column: {rows[column][int(j)] for j in in_split["train"]} for column in ("user", "item")}
            is_new = {column: rows[column][i] not in known[column] for column in known}
            assert cold == is_new["user"] + 2 * (is_new["item"] and rows["item"][i] != "")
    refused(r"split.column=None names the groups of kind 'group', and kind is 'group'", lambda: SplitConfig("group"))
    with pytest.raises(ValueError, match=r"column 'item' names the groups, but has no value in row 2"):
        _ = own(config_of(split=SplitConfig("group", column="item")), test_file=None).features


def test_values_that_only_validation_and_test_have_are_warnings(own, tmp_path):
    # 100 rows by day: 80 train (days 0-79), 10 validate, 10 test. The city is new on 4 of the test's days (40 %), the
    # day always, and the price never: 0 to 9 in each ten.
    rows = {
        "day": list(range(100)),
        "price": list(range(10)) * 10,
        "city": [*(["Rome", "Oslo"] * 48), *["Bonn"] * 4],
        "click": [0, 1, 1, 0] * 25,
    }
    roles = {"categorical": ("city",), "continuous": ("day", "price"), "time": "day"}
    pa.csv.write_csv(pa.table(rows), tmp_path / "train.csv")
    data = own(config_of(**roles, split=SplitConfig("time", val=1 / 9, test=0.1)), test_file=None)
    assert data.sizes() == {"train": 80, "val": 10, "test": 10}
    assert data.findings.warnings == [
        "column 'city': 40.0% of the test values are not in training",
        "column 'day': 100.0% of the val and 100.0% of the test values are outside the training rows' range, 0 to 79: "
        "the model has seen none such. Leave out what only grows with time (exclude: [day])",
    ]
    # A gap of 5 days is 5 rows before validation (days 75-79) and 5 before the test (85-89).
    split = SplitConfig("time", val=1 / 9, test=0.1, gap=5)
    data = own(config_of(**roles, split=split), test_file=None)
    assert "rows in the gap of 5, in no split: 10" in str(data.findings).splitlines()
    assert data.sizes() == {"train": 75, "val": 5, "test": 10}
