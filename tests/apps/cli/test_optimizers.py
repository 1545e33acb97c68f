"""Optimizers and schedulers that a configuration names by class, as under LightningCLI."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from commands import fails
from compared import CONFIG as COMPARED
from lightning.pytorch.callbacks import BatchSizeFinder
from own_net import CONFIG as OWN

from apps.cli import main
from apps.cli.train import build
from apps.compare.experiment import Experiment
from apps.train.step.module import SparseModule

SGD = ["--optimizer", "SGD", "--optimizer.lr", "0.1", "--optimizer.momentum", "0.9"]
COSINE = ["--lr_scheduler", "CosineAnnealingLR", "--lr_scheduler.T_max", "4"]
SCALES = ["--model.optimizer.router_lr_scale", "0.5", "--model.optimizer.expert_weight_decay_scale", "2"]


def groups(module: SparseModule) -> dict[str, tuple[float, float]]:
    optimizer = module.configure_optimizers()["optimizer"]
    assert type(optimizer) is torch.optim.SGD
    assert optimizer.param_groups[0]["momentum"] == 0.9
    return {g["name"]: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups}


def test_a_class_of_torchs_is_called_with_the_suites_groups(config):
    words = ["--config", config, *SGD, "--optimizer.weight_decay", "0.2", *SCALES]
    made = groups(build("fit", words).model)
    # The router at half the rate, the experts with twice the decay, none on biases and norms.
    assert made == {"rest": (0.1, 0.2), "rest_no_decay": (0.1, 0.0), "router": (0.05, 0.2), "experts": (0.1, 0.4)}
    Path("sgd.yaml").write_text(
        "optimizer: {class_path: torch.optim.SGD, init_args: {lr: 0.1, momentum: 0.9, weight_decay: 0.2}}"
    )
    assert groups(build("fit", ["--config", config, "--config", "sgd.yaml", *SCALES]).model) == made


def test_a_scheduler_has_the_given_interval_and_keeps_the_groups_rates_apart(config):
    one = ["--lr_scheduler", "OneCycleLR", "--lr_scheduler.max_lr", "0.2", "--lr_scheduler.total_steps", "9"]
    model = build("fit", ["--config", config, *SGD, *SCALES, *one, "--lr_scheduler_interval", "step"]).model
    made = model.configure_optimizers()
    assert made["lr_scheduler"]["interval"] == "step"
    assert {g["name"]: g["max_lr"] for g in made["optimizer"].param_groups}["router"] == pytest.approx(0.1)
    # A scheduler alone takes the place of the schedule of model.optimizer.
    made = build("fit", ["--config", config, *COSINE]).model.configure_optimizers()
    assert type(made["optimizer"]) is torch.optim.AdamW
    assert made["lr_scheduler"]["interval"] == "epoch"
    plateau = ["--lr_scheduler", "torch.optim.lr_scheduler.ReduceLROnPlateau"]
    with pytest.raises(ValueError, match="ReduceLROnPlateau names no metric"):
        build("fit", ["--config", config, *SGD, *plateau]).model.configure_optimizers()


@pytest.mark.slow
def test_a_resumed_run_is_the_unbroken_one_and_its_folder_says_how_it_trains(config, capsys):
    for run, *words in (["whole", "2"], ["cut", "1"]):
        assert main(["fit", "--config", config, "--run_dir", run, "--trainer.max_epochs", *words, *SGD, *COSINE]) == 0
    assert main(["fit", "--run_dir", "cut", "--ckpt_path", "last", "--trainer.max_epochs", "2"]) == 0
    ends = [torch.load(f"{run}/checkpoints/last.ckpt", weights_only=True) for run in ("whole", "cut")]
    assert all(torch.equal(v, ends[1]["state_dict"][k]) for k, v in ends[0]["state_dict"].items())
    assert ends[0]["lr_schedulers"] == ends[1]["lr_schedulers"]
    rates = [[group["lr"] for group in end["optimizer_states"][0]["param_groups"]] for end in ends]
    assert rates[0] == rates[1]
    # cos(pi / 4) after one epoch of T_max = 4, cos(pi / 2) after two: (1 + 0) / 2 of the rate.
    assert rates[0][0] == pytest.approx(0.05)
    line = fails(
        capsys, 2, "fit", "--config", config, "--run_dir", "cut", "--ckpt_path", "last", "--trainer.max_epochs", "3"
    )
    assert "optimizer=None is {'class_path': 'torch.optim.SGD'" in line
    # What a scheduler's state would hide: of the optimizer, the scheduler and the model's own groups.
    longer = ["fit", "--run_dir", "cut", "--ckpt_path", "last", "--trainer.max_epochs", "3"]
    for option, value, former in (
        ("optimizer.weight_decay", "0.5", "0.0"),
        ("lr_scheduler.T_max", "8", "4"),
        ("lr_scheduler_interval", "step", "None"),
        ("model.optimizer.router_lr_scale", "0.5", "1.0"),
    ):
        assert main([*longer, f"--{option}", value]) == 2
        assert f"{option}={value} is {former} in cut/config.yaml" in capsys.readouterr().err.replace("'", "")


def test_without_a_scheduler_a_resumed_run_takes_its_own_values(config):
    resumed = ["fit", "--config", config, "--run_dir", "run", *SGD]
    assert main(resumed) == 0
    assert main([*resumed, "--optimizer.lr", "0.2", "--ckpt_path", "last", "--trainer.max_epochs", "2"]) == 0
    last = torch.load("run/checkpoints/last.ckpt", weights_only=True)
    assert [group["lr"] for group in last["optimizer_states"][0]["param_groups"]] == [0.2] * 4


def test_a_file_beside_a_checkpoint_names_no_optimizer_but_torchs(run, capsys):
    path = run / "config.yaml"
    written = yaml.safe_load(path.read_text())
    for section in (
        {"optimizer": {"class_path": "made_up.Optimizer", "init_args": {}}},
        {"lr_scheduler": {"class_path": "torch.optim.lr_scheduler.LambdaLR", "init_args": {"lr_lambda": "os.abort"}}},
    ):
        path.write_text(yaml.safe_dump({**written, **section}))
        build("test", ["--run_dir", "run"])
        line = fails(capsys, 2, "fit", "--run_dir", "run", "--ckpt_path", "last")
        assert f"the training would be without {next(iter(section))}" in line


def test_a_module_of_the_users_own_trains_as_under_lightnings_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("own.yaml").write_text(OWN)
    assert main(["fit", "--config", "own.yaml", "--run_dir", "run", *SGD, *COSINE]) == 0
    assert "torch.optim.SGD replaces configure_optimizers of Net" in capsys.readouterr().err
    assert (
        "momentum_buffer"
        in torch.load("run/checkpoints/last.ckpt", weights_only=True)["optimizer_states"][0]["state"][0]
    )
    resumed = ["fit", "--config", "own.yaml", "--run_dir", "run", "--ckpt_path", "last", *SGD, *COSINE]
    assert main([*resumed, "--optimizer.lr", "0.2"]) == 2
    assert "error: optimizer.lr=0.2 is 0.1 in run/config.yaml, which a resumed run keeps" in capsys.readouterr().err
    assert main([*resumed, "--trainer.max_epochs", "3"]) == 0
    capsys.readouterr()
    assert "Net has its own" in fails(capsys, 1, "fit", "--config", "own.yaml", *COSINE)


def test_a_comparison_trains_all_systems_by_the_given_optimizer(config):
    Path("compared.yaml").write_text(COMPARED)
    experiment = Experiment(["--config", "compared.yaml", *SGD, *COSINE])
    assert experiment.rate == 0.1
    assert experiment.plain()["optimizer"]["init_args"]["momentum"] == 0.9
    for system in ("sparse", "dense_equal_flops"):
        module, _ = experiment.build(system, 0.3)
        assert groups(module)["rest"] == (0.3, 0.0)


@pytest.mark.parametrize("finder", ["LearningRateFinder", "BatchSizeFinder"])
def test_lightnings_finders_find(finder, run, config, capsys):
    few = {"LearningRateFinder": ("num_training_steps", "8"), "BatchSizeFinder": ("max_trials", "2")}[finder]
    own = ["--trainer.callbacks", finder, f"--trainer.callbacks.{few[0]}", few[1]]
    cli = build("fit", ["--config", config, "--run_dir", "run", *own])
    cli.execute()
    assert "run held an earlier run" in capsys.readouterr().out  # the search has not resumed it
    if finder == "BatchSizeFinder":
        assert cli.datamodule.batch_size in (4, 8)
        return
    found = next(c for c in cli.trainer.callbacks if type(c).__name__ == finder).optimal_lr
    assert len(found.results["lr"]) > 2
    assert cli.model.lr == (found.suggestion() or 1e-3)


def test_batches_that_are_counted_in_tokens_have_no_size_to_find(config):
    cli = build("fit", ["--config", config])
    cli.datamodule.batch_size = None
    with pytest.raises(ValueError, match="counts a batch in tokens: give data"):
        cli._callbacks([BatchSizeFinder()])
