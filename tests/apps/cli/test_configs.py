"""Configurations: where they are, one over another, the defaults of their classes, and the one in a run's folder."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

import core
from apps.cli import main
from apps.cli.configs import merge
from apps.cli.errors import UsageError
from apps.cli.request import Request
from apps.cli.train import build
from apps.registry import differences


def test_a_configuration_that_came_along_is_taken_where_there_is_none_here(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    name = "configs/vision/digits.yaml"
    request = Request.read("fit", ["--config", name])
    assert request.config["model"]["class_path"] == "apps.vision.module.VisionClassifier"
    assert request.run_dir == Path("runs/digits")
    assert not capsys.readouterr().err
    with pytest.raises(UsageError, match=r"no configuration .*; did you mean configs/vision/digits\.yaml\?"):
        Request.read("fit", ["--config", "configs/vision/digit.yaml"])
    Path(name).parent.mkdir(parents=True)
    Path(name).write_text("model: tiny_app.TinyModule\ndata: tiny_app.TinyData")
    assert Request.read("fit", ["--config", name]).config["model"]["class_path"] == "tiny_app.TinyModule"
    for path in ("configs/vision/digit.yaml", "vision/digits.yaml", "configs/../README.md/x"):
        with pytest.raises(UsageError, match=f"no configuration {path}"):
            Request.read("fit", ["--config", path])
    assert not capsys.readouterr().err


def test_merging_goes_mapping_by_mapping_and_drops_another_class_s_arguments():
    base = {"router": {"class_path": "core.TokenChoice", "init_args": {"top_k": 1, "noise": "fixed"}}, "n": 1}
    assert merge(base, {"router": {"init_args": {"top_k": 2}}})["router"]["init_args"] == {"top_k": 2, "noise": "fixed"}
    assert merge(base, {"router": {"class_path": "TokenChoice"}})["router"]["init_args"]["top_k"] == 1
    other = {"class_path": "ExpertChoice", "init_args": {"capacity_factor": 2.0}}
    assert merge(base, {"router": other}) == {"router": other, "n": 1}
    assert merge(base, {"router": "ExpertChoice"})["router"] == {"class_path": "ExpertChoice"}
    assert merge(base, {"n": None})["n"] is None
    assert merge({"moe": None}, {"moe": {"num_experts": 4}}) == {"moe": {"num_experts": 4}}
    assert base["n"] == 1


def test_differences_are_named_with_both_values():
    a = {"moe": {"class_path": "core.MoEConfig", "init_args": {"top": 1, "sizes": [1, 2]}}, "n": None}
    b = {"moe": {"class_path": "MoEConfig", "init_args": {"top": 2, "sizes": [1, 3]}}}
    assert list(differences(a, b, "model")) == [("model.moe.top", 1, 2), ("model.moe.sizes.1", 2, 3)]
    assert list(differences({"router": {"class_path": "core.Hash"}}, {"router": {"class_path": "Base"}})) == [
        ("router", "Hash", "Base")
    ]
    assert list(differences([1], [1, 2], "x")) == [("x", [1], [1, 2])]


@pytest.mark.parametrize("by", ["file", "flag", "flag and option"])
def test_a_class_that_is_named_has_its_own_defaults_and_not_those_of_the_one_before(config, by):
    # TinyModule's expert is FFN(hidden_dim=8), and MoEConfig's own one computes GELU; SwiGLU's default is SiLU.
    flags = ["--model.moe.expert", "core.SwiGLU"]
    if by == "file":
        Path("over.yaml").write_text("model: {init_args: {moe: {expert: {class_path: core.SwiGLU}}}}")
        flags = ["--config", "over.yaml"]
    elif by == "flag and option":
        flags += ["--model.moe.expert.hidden_dim", "16"]
    made = build("fit", ["--config", config, *flags]).model.hparams["moe"]["expert"]
    assert made["class_path"].endswith("SwiGLU")
    assert core.registered_config(made["class_path"])(**made["init_args"]) == core.SwiGLU(
        **({"hidden_dim": 16} if by == "flag and option" else {})
    )


GPU = {"accelerator": "gpu", "devices": 2, "num_nodes": 2, "strategy": "ddp"}


def change(**options: object) -> None:
    """Change options of the trainer in the run's configuration."""
    config = yaml.safe_load(Path("run/config.yaml").read_text())
    Path("run/config.yaml").write_text(yaml.safe_dump({**config, "trainer": {**config["trainer"], **options}}))


def test_an_option_inside_a_null_part_stands_in_for_the_default_part():
    flags = ["--model.conv", "null", "--model.moe", "null", "--model.backbone.name", "resnet18"]
    model = build("fit", ["--config", "configs/vision/digits.yaml", *flags]).model
    assert model.vit is None
    assert model.backbone.name == "resnet18"


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
