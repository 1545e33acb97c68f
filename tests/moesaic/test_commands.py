"""``import moesaic`` in a script: nothing heavy before a name is used, and the commands' own results as values."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from compared import CONFIG
from lightning.pytorch import Callback
from places import environment

import core
import moesaic
from apps.cli import main
from apps.report.page import html
from apps.verdict import command, schedule, training, work


@pytest.fixture(autouse=True)
def without_charts(monkeypatch) -> None:
    """Write reports with tables alone, which is quicker."""
    monkeypatch.setattr(html, "script", lambda: "")


def run(script: str, *folders: object) -> subprocess.CompletedProcess[str]:
    argv, env = [sys.executable, "-c", script], environment(*map(str, folders))
    return subprocess.run(argv, env=env, cwd="/", capture_output=True, text=True)


def test_an_import_loads_no_torch_and_the_engines_names_no_lightning():
    script = (
        "import sys, moesaic; print('torch' in sys.modules);"
        "layer = moesaic.MoEConfig(4).build(8); print('lightning' in sys.modules)"
    )
    done = run(script)
    assert done.stdout.splitlines() == ["False", "False"], done.stderr
    names: dict[str, object] = {}
    exec("from moesaic import *", names)
    assert names["fit"] is moesaic.fit
    assert names["MoEConfig"] is core.MoEConfig
    assert set(dir(moesaic)) > {*core.__all__, "fit", "test", "predict", "compare", "verdict", "load"}
    assert not hasattr(moesaic, "nothing")


def test_a_training_and_a_test_are_those_of_the_commands(tmp_path, capsys):
    class Counts(Callback):
        epochs = 0

        def on_train_epoch_end(self, *_):
            self.epochs += 1

    config, counts = yaml.safe_load(CONFIG), Counts()
    overrides = {"model.optimizer.lr": np.float32(2e-5), "trainer": {"max_epochs": np.int64(3)}}
    overrides["model.moe.router"] = moesaic.TokenChoice(1)
    fitted = moesaic.fit(config, overrides, run_dir=tmp_path / "run", callbacks=[counts])
    assert "checkpoints: " in capsys.readouterr().out  # it prints what the command prints
    assert counts.epochs == 3
    assert fitted.model.optimizer_config.lr == pytest.approx(2e-5)
    (layer,) = core.moe_layers(fitted.model).values()
    assert layer.router.config == moesaic.TokenChoice(1)
    assert fitted.best_score is not None
    assert fitted.metrics["val/top1"] <= fitted.best_score
    assert moesaic.load(fitted.run_dir).hparams == fitted.model.hparams

    tested = moesaic.test(config, run_dir=tmp_path / "run")
    saved = json.loads((tmp_path / "run" / "test.json").read_text())
    assert tested.metrics == {name: saved[name] for name in tested.metrics}
    assert "test/top1" in tested.metrics

    # The command with the same words trains the same weights.
    path = tmp_path / "tiny.yaml"
    path.write_text(CONFIG)
    words = ["--model.optimizer.lr=2e-5", "--model.moe.router", "core.TokenChoice", "--model.moe.router.top_k", "1"]
    words += ["--trainer.max_epochs", "3", "--run_dir", str(tmp_path / "again")]
    assert main(["fit", "--config", str(path), *words]) == 0
    for own, other in zip(
        moesaic.load(fitted.run_dir).parameters(), moesaic.load(tmp_path / "again").parameters(), strict=True
    ):
        assert own.equal(other)

    other_ways = {"trainer.max_epochs": 1, "optimizer": "SGD", "optimizer.lr": 0.5}
    assert moesaic.fit(config, other_ways, run_dir=tmp_path / "again", overwrite=True).metrics
    assert "--overwrite has removed the earlier run" in capsys.readouterr().out
    assert not (tmp_path / "again" / "earlier").exists()


def test_the_folder_of_a_run_may_be_among_the_overrides_and_weights_need_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    few = {"trainer.max_epochs": 1, "trainer.limit_train_batches": 1}
    fitted = moesaic.fit(yaml.safe_load(CONFIG), {**few, "run_dir": tmp_path / "run"})
    assert fitted.run_dir == tmp_path / "run"
    assert moesaic.test(overrides={"run_dir": "run"}).run_dir == Path("run")
    assert moesaic.fit((), few, weights="run").run_dir == Path("runs", "run_tuned")
    with pytest.raises(ValueError, match=r"^run_dir=other is also in overrides: give it once$"):
        moesaic.fit(yaml.safe_load(CONFIG), {"run_dir": "run"}, run_dir="other")


def test_predictions_are_a_file_that_is_not_replaced_unasked(tmp_path):
    few = {"trainer.limit_predict_batches": 1}  # an evaluation has batches of 256
    asked = {"run_dir": tmp_path / "run", "ckpt_path": "none"}
    predicted = moesaic.predict("configs/vision/digits.yaml", few, **asked)
    assert predicted == moesaic.Predictions(tmp_path / "run" / "predictions.jsonl", 256)
    assert len(predicted.file.read_text().splitlines()) == 256
    with pytest.raises(ValueError, match=r"predictions\.jsonl exists"):
        moesaic.predict("configs/vision/digits.yaml", few, **asked)
    assert moesaic.predict("configs/vision/digits.yaml", few, **asked, overwrite=True).num_rows == 256


@pytest.mark.parametrize(
    "overrides, said",
    [
        ({"trainer.max_epoch": 1}, "did you mean 'max_epochs'"),
        ({"model.moe.num_experts": "eight"}, "model.moe.num_experts=eight is not of type int"),
        ({"print_config": True}, "overrides: print_config is no option of seed_everything, trainer"),
        ({"model.help": True}, "overrides: model.help is no option of"),
    ],
)
def test_a_wrong_value_is_a_value_error(overrides, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        moesaic.fit(yaml.safe_load(CONFIG), overrides, run_dir=tmp_path)


def test_a_ctrl_c_in_a_test_is_an_interrupt_and_no_exit(tmp_path, monkeypatch):
    from compare_app import TinyModel

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(TinyModel, "on_test_start", stop)
    with pytest.raises(KeyboardInterrupt):  # Lightning makes an exit of it
        moesaic.test(yaml.safe_load(CONFIG), run_dir=tmp_path, ckpt_path="none")


@pytest.mark.slow
def test_a_comparison_and_a_verdict_are_values(tmp_path, monkeypatch):
    for name in ("SEEDS", "MOST_SEEDS"):
        monkeypatch.setattr(schedule, name, (2,) if name == "SEEDS" else 2)
    monkeypatch.setattr(work, "MOST_SEEDS", 2)
    monkeypatch.setattr(command, "FACTORS", (1.0,))
    monkeypatch.setattr(training, "_TRIAL_STEPS", 4)
    path = tmp_path / "tiny.yaml"
    path.write_text(CONFIG)
    few = {"seeds": 1, "rounds": 0, "learning_rates": [0.01], "baselines": ["dense_equal_flops"]}
    compared = moesaic.compare(path, {"trainer.max_epochs": 1}, output=tmp_path / "compared", **few)
    assert [row.system.name for row in compared.summary.rows] == ["sparse", "dense_equal_flops"]
    assert compared.output == tmp_path / "compared"
    given = moesaic.verdict(path, {"trainer.max_epochs": 1}, minutes=1.0, output=tmp_path / "verdict")
    assert [answer.where for answer in given.answers] == ["equal FLOPs", "equal time"]
    assert (tmp_path / "verdict" / "verdict.json").exists()


def test_a_verdict_takes_several_targets(tmp_path, monkeypatch):
    (tmp_path / "shop.csv").write_text("x,bought,spent\n1,0,0.0\n")
    monkeypatch.setattr("moesaic.commands.give_verdict", lambda options, command: (options, command))
    options, line = moesaic.verdict(tmp_path / "shop.csv", target=["bought", "spent"], exclude=["x"])
    assert (options.target, options.exclude) == (("bought", "spent"), ("x",))
    assert line.endswith("--target=bought --target=spent --minutes=30.0 --exclude x --seed=0")
    assert moesaic.verdict(tmp_path / "shop.csv", target="spent")[0].target == ("spent",)
