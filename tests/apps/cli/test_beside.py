"""The configuration in a run's folder: what it is taken for, and that it names no device."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from tiny_app import CONFIG

from apps.cli import main
from apps.cli.request import Request

GPU = {"accelerator": "gpu", "devices": 2, "num_nodes": 2, "strategy": "ddp"}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run of one epoch that says, as one from elsewhere, that it was trained on two machines with GPUs."""
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(CONFIG)
    assert main(["fit", "--config", "tiny.yaml", "--run_dir", "run"]) == 0
    config = yaml.safe_load(Path("run/config.yaml").read_text())
    Path("run/config.yaml").write_text(yaml.safe_dump({**config, "trainer": {**config["trainer"], **GPU}}))
    return Path("run")


def test_a_run_of_gpus_is_tested_where_there_is_none(run):
    for words in (["--ckpt_path", "run"], ["--run_dir", "run"], ["--run_dir", "run", "--ckpt_path", "last"]):
        trainer = Request.read("test", words).config["trainer"]
        assert not GPU.keys() & trainer.keys()
        assert trainer["log_every_n_steps"] == 1
    assert main(["test", "--run_dir", "run"]) == 0


def test_a_run_goes_on_by_its_own_configuration(run, capsys):
    request = Request.read("fit", ["--ckpt_path", "last", "--run_dir", "run"])
    assert request.run_dir == run
    assert request.checkpoint == run / "checkpoints" / "last.ckpt"
    # It is divided as it was; the kind of device is this machine's.
    assert {k: v for k, v in request.config["trainer"].items() if k in GPU} == {
        k: GPU[k] for k in ("devices", "num_nodes", "strategy")
    }
    alone = ["--trainer.devices", "1", "--trainer.num_nodes", "1", "--trainer.strategy", "auto"]
    capsys.readouterr()
    assert main(["fit", "--ckpt_path", "last", "--run_dir", "run", "--trainer.max_epochs", "2", *alone]) == 0
    assert "trained 2 epochs, 6 steps (3 of them now)" in capsys.readouterr().out


def test_a_run_that_has_no_checkpoint_yet_begins_by_its_own_configuration(run, capsys):
    (run / "checkpoints" / "last.ckpt").unlink()
    assert Request.read("fit", ["--ckpt_path", "last", "--run_dir", "run"]).checkpoint is None
    assert main(["fit", "--run_dir", "run"]) == 2  # a new training names its own


LOGGER = ["--trainer.logger", "TensorBoardLogger", "--trainer.logger.save_dir"]


def test_commands_leave_the_logger_beside_a_checkpoint_out_and_take_a_named_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(CONFIG)
    Path("moe.yaml").write_text("num_experts: 2\nexpert: {class_path: FFN, init_args: {hidden_dim: 8}}")
    assert main(["fit", "--config", "tiny.yaml", "--run_dir", "run", *LOGGER, "logs"]) == 0
    left_out, before = "left out: trainer.logger (--config run/config.yaml", list(Path("logs").rglob("*"))
    for command in ("test", "predict", "doctor"):
        assert main([command, "--ckpt_path", "run"]) == 0
        assert capsys.readouterr().err.count(left_out) == 1, command
    assert list(Path("logs").rglob("*")) == before
    assert main(["test", "--ckpt_path", "run", *LOGGER, "named"]) == 0
    assert list(Path("named").rglob("events*"))
    assert main(["test", "--config", "run/config.yaml", "--ckpt_path", "run"]) == 0
    assert len(list(Path("logs").rglob("events*"))) == 2
