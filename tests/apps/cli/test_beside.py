"""The configuration in a run's folder: what it is taken for, and that it names no device."""

from __future__ import annotations

from pathlib import Path

import yaml

from apps.cli import main
from apps.cli.request import Request
from apps.cli.train import build

GPU = {"accelerator": "gpu", "devices": 2, "num_nodes": 2, "strategy": "ddp"}


def change(**options: object) -> None:
    """Change options of the trainer in the run's configuration."""
    config = yaml.safe_load(Path("run/config.yaml").read_text())
    Path("run/config.yaml").write_text(yaml.safe_dump({**config, "trainer": {**config["trainer"], **options}}))


def test_a_run_of_gpus_is_tested_where_there_is_none(run):
    change(**GPU)  # as in one from elsewhere
    for words in (["--ckpt_path", "run"], ["--run_dir", "run"], ["--run_dir", "run", "--ckpt_path", "last"]):
        trainer = Request.read("test", words).config["trainer"]
        assert not GPU.keys() & trainer.keys()
        assert trainer["log_every_n_steps"] == 1
    assert main(["test", "--run_dir", "run"]) == 0


def test_a_run_goes_on_by_its_own_configuration(run, capsys):
    change(**GPU)
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
    printed = capsys.readouterr().out
    assert "going on from run/checkpoints/last.ckpt: step 3, epoch 2" in printed
    assert "trained 2 epochs, 6 steps (3 of them now), in" in printed


def test_a_run_that_has_no_checkpoint_yet_begins_by_its_own_configuration(run, capsys):
    (run / "checkpoints" / "last.ckpt").unlink()
    assert Request.read("fit", ["--ckpt_path", "last", "--run_dir", "run"]).checkpoint is None
    assert main(["fit", "--run_dir", "run"]) == 2  # a new training names its own


def test_commands_leave_the_logger_beside_a_checkpoint_out_and_take_a_named_one(run, capsys):
    change(logger={"class_path": "TensorBoardLogger", "init_args": {"save_dir": "logs"}})
    for command in ("test", "predict", "doctor"):
        if command == "doctor":
            assert main([command, "--ckpt_path", "run"]) == 0
        else:
            build(command, ["--ckpt_path", "run"])
        assert capsys.readouterr().err.count("left out: trainer.logger (--config run/config.yaml") == 1, command
    assert not Path("logs").exists()
    named = ["--trainer.logger", "TensorBoardLogger", "--trainer.logger.save_dir", "named"]
    assert main(["test", "--ckpt_path", "run", *named]) == 0
    assert list(Path("named").rglob("events*"))
    trainer = build("test", ["--config", "run/config.yaml", "--ckpt_path", "run"]).trainer
    assert trainer.loggers[0].save_dir == "logs"
