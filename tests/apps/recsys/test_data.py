"""TableData: a table of every kind of column, from its file to batches; what it refuses; what it keeps."""

from __future__ import annotations

import gzip
import os
import pickle
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import jsonargparse
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer

from apps import sources
from apps.loader import ResumableLoader
from apps.recsys import build as build_module
from apps.recsys.data import TableData
from apps.recsys.features import CategoricalFeature
from apps.recsys.schema import SplitConfig, TableConfig, TaskConfig
from apps.recsys.synthetic import SyntheticConfig

NAN = float("nan")

# Rows 0 to 5 train; rows 6 and 7 come from a test file.
TRAIN = {
    "city": ["Rome", "Rome", "NA", "Oslo", "", "Rome"],
    "tags": ["x|y", "", "y", "x", "y|z", "y"],
    "user": [1, 1, 2, 2, 3, 3],
    "age": ["10", "20", "", "40", "inf", "50"],
    "shop": ["de", "fr", "de", "de", "fr", "de"],
    "click": [1, 0, 1, 0, 0, 1],
    "stars": ["5", "4", "", "1", "3", "2"],
    "other": ["is", "not", "read", "at", "all", "x"],
}
TEST = {
    "city": ["Paris", "Rome"],
    "tags": ["w|x", "z"],
    "user": [1, 9],
    "age": ["30", "nan"],
    "shop": ["fr", "de"],
    "click": [1, 0],
    "stars": ["4", "1"],
    "other": ["", ""],
}
CONFIG = TableConfig(
    categorical=("city", "user"),
    multi_valued=("tags",),
    continuous=("age",),
    tasks={"click": TaskConfig("click"), "like": TaskConfig("stars", at_least=4)},
    domain="shop",
    user="user",
    hash_rows={"user": 100},
    split=SplitConfig("given", val=0),
)


def write(folder, kind="csv", train=TRAIN, test=TEST):
    for name, columns in (("train", train), ("test", test)):
        table = pa.table(columns)
        if kind == "parquet":
            pa.parquet.write_table(table, folder / f"{name}.parquet")
        else:
            pa.csv.write_csv(table, folder / f"{name}.csv")


@pytest.fixture
def own(tmp_path):
    """Makes a TableData of the table above, with changes."""
    write(tmp_path)

    def make(config=CONFIG, kind="csv", **options) -> TableData:
        files = {"train_file": f"train.{kind}", "test_file": f"test.{kind}"}
        return TableData(
            "table", str(tmp_path), str(tmp_path / "cache"), table=config, **{**files, "seed": 0, **options}
        )

    return make


def changed(**columns):
    return {**TRAIN, **columns}


def config_of(**options):
    roles = {"categorical": ("city",), "tasks": {"click": TaskConfig("click")}, "split": SplitConfig("given", val=0)}
    return TableConfig(**{**roles, **options})


def by_row(batch):
    """A batch as plain values, an example each: what a reader would write down."""
    sparse = batch.sparse.to_dict()
    return [
        {
            "index": int(batch.index_B[b]),
            "dense": batch.dense_BC[b].tolist(),
            "label": batch.label_Bt[b].tolist(),
            "domain": None if batch.domain_B is None else int(batch.domain_B[b]),
            "group": None if batch.group_B is None else int(batch.group_B[b]),
            **{key: jagged.to_dense()[b].tolist() for key, jagged in sparse.items()},
        }
        for b in range(len(batch))
    ]


def same(a, b):
    # NaN differs from itself; its text does not
    return repr(a) == repr(b)


# ---- what is read


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_table_of_every_kind_of_column_by_hand(own, tmp_path, kind):
    write(tmp_path, kind)
    data = own(kind=kind)
    features = data.features
    # In training Rome has 3 rows, "NA" and Oslo one each (by text); the empty field is missing. Paris is not there.
    assert features.categorical[0] == CategoricalFeature("city", 4)
    assert features.categorical[1] == CategoricalFeature("user", 100, hashed=True)
    assert features.categorical[2] == CategoricalFeature("tags", 4, multi_valued=True)
    assert data.vocabulary("city") == (None, "Rome", "NA", "Oslo")
    assert data.vocabulary("tags") == (None, "y", "x", "z")  # y 4 times, x 2, z 1
    assert data.vocabulary("shop") == ("de", "fr")
    # ages 10, 20, 40, 50: mean 30, variance (400 + 100 + 100 + 400) / 4; an empty field and inf of six are missing
    age = features.continuous[0]
    assert (age.name, age.mean, age.std, age.quantiles) == ("age", 30, 250**0.5, (10, 20, 40))
    assert age.missing == pytest.approx(2 / 6)
    # stars >= 4 in 2 of the 5 rows that have some
    assert (features.tasks, features.positives) == (("click", "like"), (0.5, 0.4))
    assert features.num_domains == 2

    train = by_row(data.rows("train")[:])
    assert [r["index"] for r in train] == [0, 1, 2, 3, 4, 5]
    assert [r["city"] for r in train] == [[1], [1], [2], [3], [0], [1]]
    assert [r["tags"][: len(t.split("|")) if t else 0] for r, t in zip(train, TRAIN["tags"], strict=True)] == [
        [2, 1], [], [1], [2], [1, 3], [1],
    ]  # fmt: skip
    assert same([r["dense"] for r in train], [[10.0], [20.0], [NAN], [40.0], [NAN], [50.0]])
    assert same([r["label"] for r in train], [[1.0, 1.0], [0.0, 1.0], [1.0, NAN], [0.0, 0.0], [0.0, 0.0], [1.0, 0.0]])
    assert [r["domain"] for r in train] == [0, 1, 0, 0, 1, 0]
    assert [r["group"] for r in train] == [0, 0, 1, 1, 2, 2]

    test = data.rows("test")[:]
    assert test.sparse.keys() == ["city", "user", "tags"]
    assert test.sparse["city"].values().tolist() == [0, 1]  # Paris: not seen in training
    assert test.sparse["tags"].lengths().tolist() == [2, 1]
    assert test.sparse["tags"].values().tolist() == [0, 2, 3]  # w: not seen
    assert test.index_B.tolist() == [6, 7]
    assert test.group_B.tolist() == [0, 3]
    user = {str(u): int(r) for u, r in zip(TRAIN["user"], data.rows("train")[:].sparse["user"].values(), strict=True)}
    assert test.sparse["user"].values()[0] == user["1"]
    assert 1 <= test.sparse["user"].values()[1] < 100  # user 9 is new, but hashed
    assert same([r["dense"] for r in by_row(test)], [[30.0], [NAN]])

    report = data.report
    assert report.rows == {"train": 6, "val": 0, "test": 2}
    assert report.missing["city"] == {"train": 1 / 6, "val": 0, "test": 0}
    assert report.missing["age"] == {"train": 2 / 6, "val": 0, "test": 1 / 2}
    assert report.missing["tags"] == {"train": 1 / 6, "val": 0, "test": 0}
    assert report.unseen["city"] == {"train": 0, "val": 0, "test": 1 / 2}
    assert report.unseen["user"] == {"train": 0, "val": 0, "test": 1 / 2}
    assert report.unseen["tags"] == {"train": 0, "val": 0, "test": 1 / 3}
    assert report.labelled["like"] == {"train": 5, "val": 0, "test": 2}
    assert "column city: unseen in 0.00% train, 50.00% test" in str(report)


def test_types_may_differ_between_files(own, tmp_path):
    # Rows of users as numbers in one file and as text in another.
    write(tmp_path, "parquet", test={**TEST, "user": ["1", "9"]})
    data = own(kind="parquet")
    train, test = data.rows("train")[:], data.rows("test")[:]
    assert test.sparse["user"].values()[0] == train.sparse["user"].values()[0]


def test_a_pattern_takes_several_files_and_compressed_text_is_read(own, tmp_path):
    table = pa.table(TRAIN)
    for number, rows in enumerate((table.slice(0, 4), table.slice(4))):
        with pa.CompressedOutputStream(str(tmp_path / f"part-{number}.tsv.gz"), "gzip") as file:
            pa.csv.write_csv(rows, file, pa.csv.WriteOptions(delimiter="\t"))
    found = own(train_file="part-*.tsv.gz")
    assert same(by_row(found.rows("train")[:]), by_row(own().rows("train")[:]))
    assert found.features == own().features


def test_validation_rows_from_a_file_are_numbered_after_training_rows(own, tmp_path):
    pa.csv.write_csv(pa.table(TRAIN).slice(0, 3), tmp_path / "val.csv")
    data = own(val_file="val.csv", split=SplitConfig("random"))
    indices = [data.rows(s).index.tolist() for s in ("train", "val", "test")]
    assert indices == [[0, 1, 2, 3, 4, 5], [6, 7, 8], [9, 10]]  # nothing is drawn: the files give it all
    assert same(data.rows("val")[:].dense_BC.tolist(), [[10.0], [20.0], [NAN]])


def test_nothing_is_learned_from_rows_that_do_not_train(own, tmp_path):
    features = own().features
    write(tmp_path, test={**TEST, "age": ["1000", "2000"], "city": ["Rome", "Rome"]})
    assert own().features == features
    # Nor from validation rows, whose number changes what is learned.
    fewer = own(split=SplitConfig("given", val=0.5)).features
    assert fewer.continuous != features.continuous


# ---- batches


def test_a_shuffled_batch_equals_its_rows_one_by_one(own):
    rows = own().rows("train")
    order = [4, 0, 5, 5, 1]
    whole = by_row(rows.__getitems__(order))
    single = [by_row(rows[i])[0] for i in order]
    for a, b in zip(whole, single, strict=True):  # to_dense pads to the longest list of the batch
        length = len(b["tags"])
        assert same({**a, "tags": a["tags"][:length]}, b)
        assert set(a["tags"][length:]) <= {0}


def test_the_jagged_tensor_is_what_torchrec_would_compute_itself(own):
    for config in (CONFIG, CONFIG.without(["tags"]), CONFIG.without(["city", "user"])):
        batch = own(config).rows("train").__getitems__(torch.tensor([4, 1, 0]))
        sparse = batch.sparse
        from_scratch = type(sparse)(sparse.keys(), sparse.values(), lengths=sparse.lengths())
        assert from_scratch.stride() == sparse.stride() == 3
        assert torch.equal(sparse.offsets(), from_scratch.offsets())
        assert sparse.length_per_key() == from_scratch.length_per_key()
        assert sparse.offset_per_key() == from_scratch.offset_per_key()
        for key in sparse.keys():  # noqa: SIM118  not a dict
            assert torch.equal(sparse[key].values(), from_scratch[key].values())


def test_a_batch_of_one_and_of_none(own):
    rows = own().rows("train")
    assert len(rows[3]) == 1
    assert rows[3].sparse["city"].values().tolist() == [3]
    empty = rows.__getitems__([])
    assert (len(empty), empty.sparse.values().numel(), empty.dense_BC.shape) == (0, 0, (0, 1))


def test_tables_with_one_kind_of_column_alone(own):
    dense = own(config_of(categorical=(), continuous=("age",)))
    batch = dense.rows("train")[:]
    assert (batch.sparse, batch.domain_B, batch.group_B) == (None, None, None)
    categories = own(config_of()).rows("train")[:]
    assert categories.dense_BC.shape == (6, 0)
    lists = own(config_of(categorical=(), multi_valued=("tags",))).rows("train")[:]
    assert lists.sparse["tags"].lengths().tolist() == [2, 0, 1, 1, 2, 1]


def epoch_of(data, epoch, loader=None):
    loader = data.train_dataloader() if loader is None else loader
    loader.batch_sampler.sampler.set_epoch(epoch)
    return [b.index_B.tolist() for b in loader]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_hangs_on_seed_and_number_alone_and_resumes_in_the_middle(own, workers):
    data = own(batch_size=2)
    whole = epoch_of(data, 1)
    assert sorted(i for batch in whole for i in batch) == [0, 1, 2, 3, 4, 5]
    assert whole == epoch_of(own(batch_size=2, num_workers=workers), 1)
    assert whole != epoch_of(data, 0)
    assert whole != epoch_of(own(batch_size=2, seed=1), 1)
    stopped = data.train_dataloader()
    stopped.batch_sampler.sampler.set_epoch(1)
    next(iter(stopped))
    resumed = own(batch_size=2, num_workers=workers).train_dataloader()
    resumed.load_state_dict(stopped.state_dict())
    assert epoch_of(data, 1, resumed) == whole[1:]


def test_batches_from_workers_are_whole(own):
    data = own(num_workers=2, eval_batch_size=4)
    alone = [by_row(b) for b in own(eval_batch_size=4).train_eval_dataloader()]
    assert same([by_row(b) for b in data.train_eval_dataloader()], alone)


def test_loaders(own):
    data = own(split=SplitConfig("given", val=0.34), batch_size=3, eval_batch_size=1, drop_last=True)
    data.prepare_data()
    data.setup("fit")
    assert isinstance(data.train_dataloader(), ResumableLoader)
    assert [len(b) for b in data.train_dataloader()] == [3]  # of 4
    assert [len(b) for b in data.val_dataloader()] == [1, 1]
    assert [b.index_B.tolist() for b in data.test_dataloader()] == [[6], [7]]
    assert [b.index_B.tolist() for b in data.predict_dataloader()] == [[6], [7]]
    order = [int(b.index_B) for b in data.train_eval_dataloader()]
    assert order == sorted(order)
    state = torch.get_rng_state()
    list(data.val_dataloader())
    list(data.train_dataloader())
    assert torch.equal(state, torch.get_rng_state())
    assert own().val_dataloader() == []
    with pytest.raises(ValueError, match=r"there are no test rows: split.test=0"):
        own(test_file=None, split=SplitConfig("random", val=0, test=0)).test_dataloader()


def test_subset_draws_training_rows_and_leaves_what_was_learned(own):
    data = own(subset=4)
    chosen = data.rows("train").index.tolist()
    assert len(chosen) == 4
    assert data.features == own().features
    assert chosen == own(subset=4, seed=7).rows("train").index.tolist()
    assert len(data.rows("test")) == 2
    with pytest.raises(ValueError, match="subset=7 exceeds the 6 training rows"):
        own(subset=7).rows("train")
    with pytest.raises(ValueError, match="subset=1 leaves task 'click' one class"):
        own(subset=1).rows("train")


def test_excluded_features_are_not_read(own):
    data = own(exclude=["age", "tags"])
    assert [f.name for f in data.features.categorical] == ["city", "user"]
    assert data.features.continuous == ()
    with pytest.raises(ValueError, match="exclude='agee' is not a feature; did you mean 'age'"):
        _ = own(exclude=["agee"]).features


# ---- the cache


def count_builds(monkeypatch):
    calls = []
    original = build_module.build
    monkeypatch.setattr(build_module, "build", lambda *a: calls.append(a) or original(*a))
    return calls


def test_a_table_is_encoded_once_and_anew_when_anything_changes(own, tmp_path, monkeypatch):
    calls = count_builds(monkeypatch)
    before = own().features
    assert own().features == before
    assert len(calls) == 1
    for change in ({"split": SplitConfig("given", val=0, seed=1)}, {"exclude": ["age"]}, {"table": config_of()}):
        _ = own(**{"config": change.pop("table", CONFIG), **change}).features
    assert len(calls) == 4
    os.utime(tmp_path / "train.csv", ns=(0, 0))  # as if it had been written anew
    assert own().features == before
    assert len(calls) == 5
    assert not list((tmp_path / "cache" / "tables").glob(".*"))


def test_a_damaged_table_is_encoded_anew(own, tmp_path, monkeypatch, caplog):
    expected = by_row(own().rows("train")[:])
    calls = count_builds(monkeypatch)
    (folder,) = (tmp_path / "cache" / "tables").iterdir()
    for cut in ("categorical.bin", "manifest.json"):
        os.truncate(folder / cut, 10)
        assert same(by_row(own().rows("train")[:]), expected)
        assert "is damaged" in caplog.text
        assert cut in caplog.text
    assert len(calls) == 2


def test_of_two_that_ask_at_once_one_encodes_and_the_other_waits(own, monkeypatch):
    calls = []
    original = build_module.build

    def slow(*arguments):
        calls.append(arguments)
        time.sleep(0.3)
        original(*arguments)

    monkeypatch.setattr(build_module, "build", slow)
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda _: own().features, range(2)))
    assert found[0] == found[1]
    assert len(calls) == 1


def test_a_data_module_goes_to_another_process(own):
    data = own()
    expected = by_row(data.rows("train")[:])
    assert same(by_row(pickle.loads(pickle.dumps(data)).rows("train")[:]), expected)
    assert same(by_row(pickle.loads(pickle.dumps(data.rows("train")))[:]), expected)


def test_a_cache_that_cannot_be_written_is_one_clear_error(own, tmp_path):
    (tmp_path / "cache").touch()
    with pytest.raises(sources.DataError, match=r"cannot be written .*set cache_dir"):
        _ = own().features


# ---- splits and guards


def test_a_split_by_user_keeps_users_together_and_reports_those_of_given_files(own, tmp_path):
    config = config_of(user="user", split=SplitConfig("user", val=0.34, test=0.34))
    train = {"user": [1, 1, 2, 2, 3, 3], "click": [1, 0, 1, 0, 1, 0], "city": list("abcabc")}
    write(tmp_path, train=train, test={"user": [1, 4], "click": [1, 0], "city": ["a", "a"]})
    alone = own(config, test_file=None)
    users = [set(alone.rows(s)[:].group_B.tolist()) for s in ("train", "val", "test")]
    assert [len(u) for u in users] == [1, 1, 1]
    assert len(set.union(*users)) == 3
    assert not any("the split is by user" in w for w in alone.report.warnings)
    # Both users 1 and 4 test; if user 1 also trains, that is one of two.
    given = own(config_of(user="user", split=SplitConfig("user", val=0)))
    assert "1 of 2 users of test are in train too, although the split is by user" in given.report.warnings
    with pytest.warns(UserWarning, match="1 of 2 users of test"):
        given.setup()


def test_a_feature_that_is_the_label_is_reported(own, tmp_path):
    write(tmp_path, train=changed(city=["y", "n", "y", "n", "n", "y"], age=["1", "0", "1", "0", "0", "1"]))
    warnings = own(config_of(continuous=("age",))).report.warnings
    assert [w.partition(" in every")[0] for w in warnings] == [
        "column 'city' determines the label of task 'click'",
        "column 'age' determines the label of task 'click'",
    ]


@pytest.mark.parametrize(
    ("train", "config", "message"),
    [
        (TRAIN, config_of(categorical=("citty",)), r"column 'citty' \(categorical\) is not in .*; did you mean 'city'"),
        (TRAIN, config_of(tasks={"c": TaskConfig("clicks")}), r"'clicks' \(task c\) is not in .*did you mean 'click'"),
        (changed(click=[1] * 6), config_of(), "task 'click' has positive labels alone in the train split"),
        (changed(click=[0] * 6), config_of(), "task 'click' has no positive label in the train split"),
        (
            changed(stars=[""] * 6),
            config_of(tasks={"l": TaskConfig("stars", at_least=4)}),
            "task 'l' has no label in the train split",
        ),
        (
            changed(age=["1", "2", "old", "3", "?", "4"]),
            config_of(continuous=("age",)),
            "column 'age' of the training table must hold numbers: row 2 holds 'old'; leave missing numbers empty",
        ),
        (TRAIN, config_of(num_rows={"city": 5}), "column 'city' holds 'Rome' in row 0: num_rows=5 takes row numbers"),
        (
            TRAIN,
            config_of(categorical=("user",), num_rows={"user": 9}),
            "column 'user' holds '9' in row 7: num_rows=9 takes row numbers 0 to 8",
        ),
        (
            changed(shop=["de"] * 6),
            config_of(domain="shop"),
            "names the scenario, but holds 'fr', which training lacks,",
        ),
        (changed(shop=["de", "fr", "", "fr", "de", "de"]), config_of(domain="shop"), "holds no value in row 2"),
        (
            changed(user=["1", "", "2", "2", "3", "3"]),
            config_of(user="user"),
            "column 'user' names the users, but has no value in row 1",
        ),
        (
            changed(stars=["1", "2", "3", "", "5", "6"]),
            config_of(time="stars", split=SplitConfig("time")),
            "column 'stars' orders the rows, but has no value in row 3",
        ),
        ({k: [] for k in TRAIN}, config_of(), "the training table has no rows"),
        (TRAIN, config_of(split=SplitConfig("given", val=0.01)), "the validation split is empty"),
    ],
)
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
    with pytest.raises(ValueError, match=r"cut\.csv\.gz' cannot be read: Truncated compressed stream"):
        _ = own(train_file="cut.csv.gz").features
    (tmp_path / "train.csv").write_text("")
    with pytest.raises(ValueError, match=r"train\.csv' cannot be read: Empty CSV file"):
        _ = own().features
    with pytest.raises(ValueError, match=r"train_file='trian.csv': no such file in .*; did you mean 'train.csv'"):
        _ = own(train_file="trian.csv").features
    (tmp_path / "train.txt").touch()
    with pytest.raises(ValueError, match=r"train_file='train.txt' is no .parquet, .csv or .tsv"):
        _ = own(train_file="train.txt").features
    header = (tmp_path / "test.csv").read_text().splitlines()[0].replace("other", "city")
    (tmp_path / "train.csv").write_text(header + "\na,b,1,2,c,1,1,x\n")
    with pytest.raises(ValueError, match="has two columns 'city'"):
        _ = own().features


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dataset": "censsus_income"}, "dataset='censsus_income' is not one of .*did you mean 'census_income'"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"eval_batch_size": 0}, "eval_batch_size=0 must be at least 1"),
        ({"subset": 0}, "subset=0 must be at least 1"),
        ({"num_workers": -1}, "num_workers=-1 must not be negative"),
        ({"dataset": "table"}, "dataset='table' needs train_file"),
        ({"dataset": "table", "train_file": "x.csv"}, "dataset='table' needs table"),
        ({"train_file": "x.csv"}, "train_file='x.csv' is for dataset='table', not 'census_income'"),
        ({"synthetic": SyntheticConfig()}, "synthetic is for dataset='synthetic', not 'census_income'"),
        ({"dataset": "synthetic", "root": "x"}, "root='x': dataset='synthetic' has no files"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TableData(**options)


def test_names_of_splits_and_columns_are_checked(own):
    data = own()
    with pytest.raises(ValueError, match="split='valid' is not one of train, val, test; did you mean 'val'"):
        data.rows("valid")
    with pytest.raises(ValueError, match="vocabulary of column='user' is not one of"):
        data.vocabulary("user")  # hashed: its rows have no values


# ---- the rest of the seam


def test_synthetic_tables_are_a_dataset(tmp_path):
    config = SyntheticConfig(0.9, num_rows=200, num_features=3)
    data = TableData("synthetic", cache_dir=str(tmp_path), synthetic=config)
    assert [f.name for f in data.features.continuous] == ["x0", "x1", "x2"]
    assert data.features.tasks == ("task_1", "task_2")
    assert data.report.rows == {"train": 144, "val": 16, "test": 40}
    other = TableData("synthetic", cache_dir=str(tmp_path), synthetic=SyntheticConfig(0.1, 200, 3))
    assert other.features != data.features


class Counting(LightningModule):
    """Sees batches, as Lightning hands them on, and learns one number."""

    def __init__(self):
        super().__init__()
        self.bias = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append(batch.index_B.tolist())
        assert batch.sparse["city"].values().tolist() == [int(CITY_ROWS[i]) for i in batch.index_B]
        return (self.bias - batch.label_Bt.nan_to_num()).square().mean()

    def validation_step(self, batch, batch_idx):
        self.seen.append(batch.index_B.tolist())

    test_step = validation_step

    def predict_step(self, batch, batch_idx):
        return batch.index_B

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


CITY_ROWS = [1, 1, 2, 3, 0, 1]


def test_lightning_trains_validates_tests_and_predicts(own, tmp_path):
    pa.csv.write_csv(pa.table(TRAIN).slice(0, 3), tmp_path / "val.csv")
    data = own(val_file="val.csv", batch_size=4)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = Trainer(max_epochs=2, enable_checkpointing=False, num_sanity_val_steps=0, **quiet)
    model = Counting()
    trainer.fit(model, datamodule=data)
    first, second = model.seen[:2], model.seen[3:5]
    assert [len(b) for b in (*first, *second)] == [4, 2, 4, 2]
    assert sorted(first[0] + first[1]) == sorted(second[0] + second[1]) == [0, 1, 2, 3, 4, 5]
    assert first != second
    assert model.seen[2] == model.seen[5] == [6, 7, 8]
    model.seen.clear()
    trainer.test(model, datamodule=data, verbose=False)
    assert model.seen == [[9, 10]]
    assert torch.cat(trainer.predict(model, datamodule=data)).tolist() == [9, 10]


def test_yaml_describes_a_table(tmp_path):
    text = """
    class_path: apps.recsys.data.TableData
    init_args:
      dataset: table
      train_file: train.csv
      test_file: test.csv
      table:
        categorical: [city, user]
        multi_valued: [tags]
        continuous: [age]
        tasks:
          click: {column: click}
          like: {column: stars, at_least: 4}
        domain: shop
        user: user
        hash_rows: {user: 100}
        split: {kind: given, val: 0}
    """
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningDataModule, "data")
    (tmp_path / "data.yaml").write_text(text)
    arguments = ["--data", str(tmp_path / "data.yaml"), "--data.root", str(tmp_path), "--data.table.split.seed", "5"]
    parsed = parser.parse_args(arguments)
    data = parser.instantiate(parsed).data
    assert isinstance(data, TableData)
    assert data.table == CONFIG.__class__(**{**vars(CONFIG), "split": SplitConfig("given", val=0, seed=5)})
    assert "like:\n          column: stars" in parser.dump(parsed)


def test_importing_the_datasets_is_light():
    code = (
        "import sys, apps.recsys.data\n"
        "print([m for m in ('pyarrow', 'torchrec', 'fbgemm_gpu', 'pandas', 'sklearn', 'scipy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert {"table", "synthetic"} <= {row.name for row in sources.list_datasets() if row.app == "recsys"}
