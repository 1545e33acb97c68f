"""The table recommender from the command line, and its configurations."""

import json
from pathlib import Path

import pyarrow as pa
import pytest
import torch
import yaml
from made_table import batch, features
from places import ROOT

import core
from apps.cli import main
from apps.recsys.schema import SplitConfig, TableConfig, TaskConfig
from apps.recsys.tables.data import TableData
from apps.recsys.tables.module import MultiTaskRecommender
from apps.recsys.tables.tasks import HeadConfig
from apps.registry import class_path

CONFIGS = [
    path
    for path in sorted((ROOT / "configs" / "recsys").glob("*.yaml"))
    if yaml.safe_load(path.read_text())["model"]["class_path"] == "MultiTaskRecommender"
]

CONFIG = """
model:
  class_path: apps.recsys.tables.module.MultiTaskRecommender
  init_args:
    shared:
      class_path: core.CGC
      init_args:
        num_experts: 2
        num_task_experts: [1, 2]
        expert: {class_path: core.MLP, init_args: {hidden_dims: [8]}}
    embedding: {dim: 4}
    dense: {kind: quantile}
    weighting: {weights: {click: 2.0}}
    report: null
data: {class_path: made_table.MadeTable}
trainer: {accelerator: cpu, max_epochs: 1, log_every_n_steps: 1}
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    (folder / "table.yaml").write_text(CONFIG)
    assert main(["fit", "--config", str(folder / "table.yaml"), "--run_dir", str(folder / "run")]) == 0
    return folder / "run"


def test_a_run_is_tested_and_predicted(trained):
    where = ["--config", str(trained.parent / "table.yaml"), "--run_dir", str(trained)]
    assert main(["test", *where]) == 0
    metrics = json.loads((trained / "test.json").read_text())
    assert {"test/auc", "test/auc_click", "test/gauc_buy", "test/loss"} <= metrics.keys()
    assert main(["predict", *where]) == 0
    first = json.loads((trained / "predictions.jsonl").read_text().splitlines()[0])
    assert first.keys() == {"index", "probability_click", "probability_buy", "label_click", "label_buy"}


def test_a_run_of_an_earlier_version_lacks_the_fields_that_have_come_since(trained, tmp_path, capsys):
    checkpoint = torch.load(trained / "checkpoints" / "best.ckpt", weights_only=True)
    features = checkpoint["hyper_parameters"]["features"]
    for name in ("vectors", "sequences"):
        assert features.pop(name) == []
    torch.save(checkpoint, tmp_path / "earlier.ckpt")
    where = ["--config", str(trained.parent / "table.yaml"), "--run_dir", str(tmp_path / "run")]
    assert main(["test", *where, "--ckpt_path", str(tmp_path / "earlier.ckpt")]) == 0
    features["tasks"] = ["click", "sell"]
    torch.save(checkpoint, tmp_path / "earlier.ckpt")
    assert main(["test", *where, "--ckpt_path", str(tmp_path / "earlier.ckpt")]) != 0
    assert "features.tasks.1 is buy" in capsys.readouterr().err


def test_constructors_take_what_their_own_configuration_holds(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = {"city": ["Rome", "Oslo"] * 50, "age": list(range(100)), "clicked": [1, 0, 0, 1] * 25}
    pa.csv.write_csv(pa.table(rows), "events.csv")
    flags = {
        "model": "MultiTaskRecommender",
        "model.shared": "core.MMoE",
        "model.shared.num_experts": "2",
        "model.head.hidden_dims": "[4]",
        "model.optimizer.betas": "[0.8, 0.9]",
        "data": "TableData",
        "data.dataset": "table",
        "data.train_file": "events.csv",
        "data.cache_dir": "cache",
        "data.table": "{categorical: [city], continuous: [age], tasks: {click: {column: clicked, positive: [1]}}}",
        "data.table.split": "{kind: random, val: 0.2}",
        "trainer.max_epochs": "1",
        "trainer.accelerator": "cpu",
    }
    assert main(["fit", "--run_dir", "run", *(f"--{name}={value}" for name, value in flags.items())]) == 0
    config = yaml.safe_load(Path("run/config.yaml").read_text())
    data = TableData(**config["data"]["init_args"])
    split = SplitConfig("random", val=0.2)
    expected = TableConfig(("city",), (), ("age",), {"click": TaskConfig("clicked", (1,))}, split=split)
    assert data.table == expected
    assert data.findings.rows == {"train": 72, "val": 18, "test": 10}  # a tenth of 100, then a fifth of 90
    model = MultiTaskRecommender(features=data.features, **config["model"]["init_args"])
    assert model.shared_config == core.MMoE(2, core.MLP((16,)))
    assert (model.head, model.optimizer_config.betas) == (HeadConfig(hidden_dims=(4,)), (0.8, 0.9))
    checkpoint = torch.load("run/checkpoints/last.ckpt", weights_only=True)
    assert dict(model.hparams) == checkpoint["hyper_parameters"]
    model.load_state_dict(checkpoint["state_dict"])


def test_mappings_that_are_no_configs_are_refused_with_their_place():
    for options, message in (
        ({"table": {"tasks": {"a": {"colum": "x"}}}}, "table.tasks.a: TaskConfig has no field 'colum'; did you mean"),
        ({"split": {"class_path": "core.MMoE"}}, r"split: class_path='core\.MMoE' is no SplitConfig"),
    ):
        with pytest.raises(ValueError, match=message):
            TableData("table", train_file="t.csv", **options)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--data.tags", "false"],
            "model.features.categorical.1.multi_valued=True does not fit the data, whose "
            "features.categorical.1.multi_valued is False",
        ),
        (["--model.shared.num_experts", "3"], "model.shared.num_experts=2 in the checkpoint, 3 here"),
        (["--model.embedding.kind", "fused", "--model.embedding.dim", "6"], "embedding.dim=6 is not a multiple of 4"),
    ],
)
def test_what_does_not_fit_is_named(trained, capsys, flags, message):
    capsys.readouterr()
    where = ["--config", str(trained.parent / "table.yaml"), "--run_dir", str(trained)]
    assert main(["test", *where, *flags]) != 0
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_a_configuration_trains_a_step(path):
    # Made columns stand for the dataset's, which is not on every machine.
    parts = yaml.safe_load(path.read_text())
    options, num_domains = parts["model"]["init_args"], 3 if "domain" in parts["data"]["init_args"] else 0
    if options.get("head", {}).get("personal"):
        options["head"]["personal"] = ["city"]
    model = MultiTaskRecommender(features(num_domains=num_domains), **options)
    out = model.train().task_loss(batch(32, num_domains=num_domains))
    out.loss.backward()
    assert out.loss.isfinite()
    assert class_path(type(model.shared_config)).endswith(options["shared"]["class_path"].removeprefix("core."))


def test_a_run_says_what_its_columns_are_worth_and_how_new_rows_differ(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    rows = {"ts": [*range(100)], "city": ["Rome", "Oslo"] * 50, "click": [0, 1, 1, 0] * 25}
    pa.csv.write_csv(pa.table(rows), "rows.csv")
    table = {"categorical": ["city"], "continuous": ["ts"], "tasks": {"click": {"column": "click"}}, "time": "ts"}
    table["split"] = {"kind": "time", "val": 0.2, "test": 0.2, "gap": 3}
    data = {"dataset": "table", "train_file": "rows.csv", "cache_dir": "cache", "table": table}
    model = {"class_path": "MultiTaskRecommender", "init_args": {"shared": None, "report": None}}
    Path("c.yaml").write_text(yaml.safe_dump({"model": model, "data": {"class_path": "TableData", "init_args": data}}))
    assert main(["fit", "--config", "c.yaml", "--run_dir", "run", "--trainer.max_epochs", "1"]) == 0
    assert main(["predict", "--ckpt_path", "run", "--explain"]) == 0
    lines = Path("run/predictions.importance.csv").read_text().splitlines()
    assert lines[0] == "column,task,metric,importance,ci95,rows"
    assert {line.partition(",")[0] for line in lines[1:]} == {"city", "ts"}
    assert {line.rpartition(",")[2] for line in lines[1:]} == {"20"}, "the last 20 rows of 100 test"
    Path("p.importance.csv").write_text("mine")
    for output, message in (
        ("p.csv", "p.importance.csv exists: --overwrite replaces it"),
        ("q.csv", "explain shuffles columns of labeled test rows: leave out data.predict_file=rows.csv"),
    ):
        capsys.readouterr()
        more = ["--data.predict_file", "rows.csv"] if output == "q.csv" else []
        assert main(["predict", "--ckpt_path", "run", "--explain", "--output", output, *more]) == 2
        assert message in capsys.readouterr().err
        assert not Path(output).exists()
    assert Path("p.importance.csv").read_text() == "mine"
    # Rows 0 to 60 train: 80 before the test, of which the last 16 validate, and two gaps of 3.
    assert main(["doctor", "--ckpt_path", "run", "--data", "rows.csv"]) == 1
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "column 'ts': 39.0% of the values are outside training's 0 to 60: predictions extrapolate"
    assert out[-1] == "1 finding: rows.csv against the training of run"
    pa.csv.write_csv(pa.table(rows).slice(0, 61), "same.csv")
    assert main(["doctor", "--ckpt_path", "run", "--data", "same.csv"]) == 0
    assert capsys.readouterr().out == "no drift: same.csv against the training of run\n"
    assert main(["doctor", "--ckpt_path", "run", "--data", "same.csv", "--data.seed", "1"]) == 2
    assert "leave out --ablate and --data.KEY" in capsys.readouterr().err
