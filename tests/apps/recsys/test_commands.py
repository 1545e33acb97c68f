"""The table recommender from the command line, and its configurations."""

import json
from pathlib import Path

import pytest
import yaml
from made_table import batch, features

from apps.cli import main
from apps.cli.train import build, quiet
from apps.recsys.data import TableData

ROOT = Path(__file__).parents[3]
CONFIGS = [
    path
    for path in sorted((ROOT / "configs" / "recsys").glob("*.yaml"))
    if yaml.safe_load(path.read_text())["model"]["class_path"] == "apps.recsys.module.MultiTaskRecommender"
]

CONFIG = """
model:
  class_path: apps.recsys.module.MultiTaskRecommender
  init_args:
    shared:
      class_path: core.CGC
      init_args: {num_experts: 2, num_task_experts: 1, expert: {class_path: core.MLP, init_args: {hidden_dims: [8]}}}
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


def test_a_run_is_tested_predicted_and_resumed(trained):
    where = ["--config", str(trained.parent / "table.yaml"), "--run_dir", str(trained)]
    assert main(["test", *where]) == 0
    found = json.loads((trained / "test.json").read_text())
    assert {"test/auc", "test/auc_click", "test/gauc_buy", "test/loss"} <= found.keys()
    assert main(["predict", *where]) == 0
    first = json.loads((trained / "predictions.jsonl").read_text().splitlines()[0])
    assert first.keys() == {"index", "probability_click", "probability_buy", "label_click", "label_buy"}
    assert main(["fit", *where, "--ckpt_path", "last", "--trainer.max_epochs", "2"]) == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--data.tags", "false"],
            "model.features.categorical.1.multi_valued=True does not fit the data, whose "
            "features.categorical.1.multi_valued is False",
        ),
        (["--model.shared.num_experts", "3"], "model.shared.num_experts=2 in the checkpoint, 3 here"),
        (["--model.head.kind", "esm"], "model.head.kind"),
        (["--model.embedding.kind", "fused", "--model.embedding.dim", "6"], "embedding.dim=6 is not a multiple of 4"),
    ],
)
def test_what_does_not_fit_is_named(trained, capsys, flags, message):
    capsys.readouterr()
    where = ["--config", str(trained.parent / "table.yaml"), "--run_dir", str(trained)]
    assert main(["test", *where, *flags]) != 0
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_a_configuration_trains_a_step(path, monkeypatch, tmp_path):
    # Made columns stand for the dataset's, which is not on every machine.
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(TableData, "features", features())
    with quiet():
        cli = build("fit", ["--config", str(path), "--trainer.accelerator", "cpu"])
    out = cli.model.train().task_loss(batch(32))
    out.loss.backward()
    assert out.loss.isfinite()
    shared = "core.MMoE" if path.stem != "census_ple" else "core.PLE"
    assert yaml.safe_load(path.read_text())["model"]["init_args"]["shared"]["class_path"] == shared
