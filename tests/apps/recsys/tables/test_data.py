"""TableData: a table of every kind of column, from its file to Lightning."""

import ast
import dataclasses
import os
import pickle

import pyarrow as pa
import pytest
import torch
import yaml
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.utilities import rank_zero_only
from own_table import CONFIG, NAN, TEST, TRAIN, by_row, config_of, same, write
from places import ROOT
from quiet_trainer import quiet_trainer
from refusals import refused

from apps.cli.flags import with_flags
from apps.cli.values import make, plain, read
from apps.data import datasets
from apps.recsys.encoding.features import CategoricalFeature
from apps.recsys.readers.synthetic import SyntheticConfig
from apps.recsys.schema import SplitConfig
from apps.recsys.tables.data import TableData
from apps.recsys.tables.encode import build as build_module


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
    assert (features.tasks, features.positives, features.num_domains) == (("click", "like"), (0.5, 0.4), 2)
    train = by_row(data.rows("train")[:], features)
    assert [r["index"] for r in train] == [0, 1, 2, 3, 4, 5]
    assert [r["city"] for r in train] == [[1], [1], [2], [3], [0], [1]]
    assert [r["tags"] for r in train] == [[2, 1], [], [1], [2], [1, 3], [1]]
    assert same([r["dense"] for r in train], [[10.0], [20.0], [NAN], [40.0], [NAN], [50.0]])
    assert same([r["label"] for r in train], [[1.0, 1.0], [0.0, 1.0], [1.0, NAN], [0.0, 0.0], [0.0, 0.0], [1.0, 0.0]])
    assert [r["domain"] for r in train] == [0, 1, 0, 0, 1, 0]
    assert [r["group"] for r in train] == [0, 0, 1, 1, 2, 2]
    test = data.rows("test")[:]
    assert [f.name for f in data.features.categorical] == ["city", "user", "tags"]
    assert test.single_FB[0].tolist() == [0, 1]  # Paris: not seen in training
    assert test.lists[0].length_B.tolist() == [2, 1]
    assert test.lists[0].values_N.tolist() == [0, 2, 3]  # w: not seen
    assert (test.index_B.tolist(), test.group_B.tolist()) == ([6, 7], [0, 3])
    user = {str(u): int(r) for u, r in zip(TRAIN["user"], data.rows("train")[:].single_FB[1], strict=True)}
    assert test.single_FB[1, 0] == user["1"]
    assert 1 <= test.single_FB[1, 1] < 100  # user 9 is new, but hashed
    assert same([r["dense"] for r in by_row(test, features)], [[30.0], [NAN]])
    findings = data.findings
    assert findings.rows == {"train": 6, "val": 0, "test": 2}
    assert findings.missing["city"] == {"train": 1 / 6, "val": 0, "test": 0}
    assert findings.missing["age"] == {"train": 2 / 6, "val": 0, "test": 1 / 2}
    assert findings.missing["tags"] == {"train": 1 / 6, "val": 0, "test": 0}
    assert findings.unseen["city"] == {"train": 0, "val": 0, "test": 1 / 2}
    assert findings.unseen["user"] == {"train": 0, "val": 0, "test": 1 / 2}
    assert findings.unseen["tags"] == {"train": 0, "val": 0, "test": 1 / 3}
    assert findings.labeled["like"] == {"train": 5, "val": 0, "test": 2}
    assert "column city: unseen in 0.00% train, 50.00% test" in str(findings)


@pytest.mark.filterwarnings("ignore")
def test_one_process_tells_what_was_found(own, monkeypatch, caplog):
    for rank, times in ((1, 0), (0, 1)):
        monkeypatch.setattr(rank_zero_only, "rank", rank)
        caplog.clear()
        with caplog.at_level("INFO", logger="apps.recsys.tables.data"):
            own().setup()
        assert caplog.text.count("table: 6 train, 0 val, 2 test rows") == times


def test_types_may_differ_between_files_and_a_pattern_takes_several(own, tmp_path):
    # Rows of users as numbers in one file and as text in another.
    write(tmp_path, "parquet", test={**TEST, "user": ["1", "9"]})
    data = own(kind="parquet")
    assert data.rows("test")[:].single_FB[1, 0] == data.rows("train")[:].single_FB[1, 0]
    table = pa.table(TRAIN)
    for number, rows in enumerate((table.slice(0, 4), table.slice(4))):
        with pa.CompressedOutputStream(str(tmp_path / f"part-{number}.tsv.gz"), "gzip") as file:
            pa.csv.write_csv(rows, file, pa.csv.WriteOptions(delimiter="\t"))
    compressed = own(train_file="part-*.tsv.gz")
    assert same(*(by_row(data.rows("train")[:], data.features) for data in (compressed, own())))
    assert compressed.features == own().features


def test_what_training_teaches_comes_from_its_rows_alone(own, tmp_path):
    # Nothing is learned from rows that do not train.
    features = own().features
    write(tmp_path, test={**TEST, "age": ["1000", "2000"], "city": ["Rome", "Rome"]})
    assert own().features == features
    # Nor from validation rows, whose number changes what is learned.
    fewer = own(split=SplitConfig("given", val=0.5)).features
    assert fewer.continuous != features.continuous
    # Values that are written otherwise in another file are reported.
    warning = "column 'city': 100% of the test values are not in training: are they written alike there?"
    assert warning not in own().findings.warnings
    write(tmp_path, test={**TEST, "city": ["rome", "oslo"]})
    assert warning in own().findings.warnings


def test_synthetic_tables_are_a_dataset(tmp_path):
    config = SyntheticConfig(0.9, num_rows=200, num_features=3)
    data = TableData("synthetic", cache_dir=str(tmp_path), synthetic=config)
    assert [f.name for f in data.features.continuous] == ["x0", "x1", "x2"]
    assert data.features.tasks == ("task_1", "task_2")
    assert data.findings.rows == {"train": 144, "val": 16, "test": 40}
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
        assert batch.single_FB[0].tolist() == [[1, 1, 2, 3, 0, 1][i] for i in batch.index_B]  # the cities' rows
        return (self.bias - batch.label_Bt.nan_to_num()).square().mean()

    def validation_step(self, batch, batch_idx):
        self.seen.append(batch.index_B.tolist())

    test_step = validation_step

    def predict_step(self, batch, batch_idx):
        return batch.index_B

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_lightning_trains_validates_tests_and_predicts(own, tmp_path):
    pa.csv.write_csv(pa.table(TRAIN).slice(0, 3), tmp_path / "val.csv")
    data, model = own(val_file="val.csv", split=SplitConfig("random"), batch_size=4), Counting()
    # Validation rows are numbered after those of training; nothing is drawn: the files give it all.
    assert [data.rows(s).index.tolist() for s in ("train", "val", "test")] == [[*range(6)], [6, 7, 8], [9, 10]]
    assert same(data.rows("val")[:].dense_BC.tolist(), [[10.0], [20.0], [NAN]])
    trainer = quiet_trainer(tmp_path, max_epochs=2, num_sanity_val_steps=0)
    trainer.fit(model, datamodule=data)
    first, second = model.seen[:2], model.seen[3:5]
    assert [len(b) for b in (*first, *second)] == [4, 2, 4, 2]
    assert sorted(first[0] + first[1]) == sorted(second[0] + second[1]) == [0, 1, 2, 3, 4, 5]
    assert first != second
    assert model.seen[2] == model.seen[5] == [6, 7, 8]
    model.seen.clear()
    trainer.test(model, datamodule=data, verbose=False)
    assert (model.seen, torch.cat(trainer.predict(model, datamodule=data)).tolist()) == ([[9, 10]], [9, 10])


def test_yaml_describes_a_table(tmp_path):
    table = """{categorical: [city, user], multi_valued: [tags], continuous: [age], domain: shop, user: user,
        tasks: {click: {column: click}, like: {column: stars, at_least: 4}}, hash_rows: {user: 100},
        split: {kind: given, val: 0}}"""
    text = f"""
    class_path: apps.recsys.tables.data.TableData
    init_args: {{dataset: table, train_file: train.csv, test_file: test.csv, table: {table}}}
    """
    flags = ["--data.root", str(tmp_path), "--data.table.split.seed", "5"]
    section = read(with_flags({"data": yaml.safe_load(text)}, flags)["data"], LightningDataModule, "data")
    data = make(section)
    assert isinstance(data, TableData)
    assert data.table == CONFIG.__class__(**{**vars(CONFIG), "split": SplitConfig("given", val=0, seed=5)})
    assert plain(section)["init_args"]["table"]["tasks"]["like"]["column"] == "stars"


def test_importing_the_datasets_is_light():
    """What the tops of the files import, and those that they import."""
    reached, todo = set(), ["apps.recsys.tables.data"]
    while todo:
        name = todo.pop()
        if name not in reached:
            reached.add(name)
            path = ROOT / name.replace(".", "/")
            files = [f for f in (path / "__init__.py", path.with_suffix(".py")) if f.is_file()]
            for file, node in ((f, node) for f in files for node in ast.parse(f.read_text("utf-8")).body):
                if not isinstance(node, ast.Import | ast.ImportFrom):
                    continue
                package = name if file.name == "__init__.py" else name.rpartition(".")[0]
                level = node.level if isinstance(node, ast.ImportFrom) else 0
                above = package.rsplit(".", level - 1)[0] + "." if level else ""
                start = f"{above}{node.module or ''}.".replace("..", ".") if isinstance(node, ast.ImportFrom) else ""
                targets = [start + own.name for own in node.names]
                todo += [t.rsplit(".", n)[0] for t in targets for n in range(t.count(".") + 1)]
    heavy = {"pyarrow", "torchrec", "fbgemm_gpu", "pandas", "sklearn", "scipy"}
    assert {"torch", "apps.data.datasets", "apps.recsys.encoding.features"} <= reached
    assert {name.split(".")[0] for name in reached} & heavy == set()
    assert {"table", "synthetic"} <= {row.name for row in datasets.list_datasets() if row.app == "recsys"}


def test_a_table_is_encoded_once_and_anew_when_anything_changes(own, tmp_path, monkeypatch):
    calls, original = [], build_module.build
    monkeypatch.setattr(build_module, "build", lambda *a, **k: calls.append(a) or original(*a, **k))
    before = own().features
    assert (own().features, len(calls)) == (before, 1)
    for change in ({"split": SplitConfig("given", val=0, seed=1)}, {"exclude": ["age"]}, {"table": config_of()}):
        _ = own(**{"config": change.pop("table", CONFIG), **change}).features
    assert len(calls) == 4
    os.utime(tmp_path / "train.csv", ns=(0, 0))  # as if it had been written anew
    assert (own().features, len(calls)) == (before, 5)
    assert not list((tmp_path / "cache" / "tables").glob(".*"))


def test_a_data_module_goes_to_another_process_and_a_column_that_is_there_is_the_domain(own):
    data = own()
    expected = by_row(data.rows("train")[:], data.features)
    assert same(by_row(pickle.loads(pickle.dumps(data)).rows("train")[:], data.features), expected)
    assert same(by_row(pickle.loads(pickle.dumps(data.rows("train")))[:], data.features), expected)
    without = dataclasses.replace(CONFIG, domain=None)
    assert own(without).features.num_domains == 0
    data = own(without, domain="shop")
    assert (data.features, data.domain_values) == (own().features, ("de", "fr"))
    with pytest.raises(ValueError, match=r"column 'shp' \(domain\) is not in .*train.csv'; did you mean 'shop'"):
        _ = own(without, domain="shp").features
    refused("column 'click' is a label and the domain", lambda: own(without, domain="click").features)
