"""``moesaic fit`` and ``test`` of a LightningModule of the user's own, with the section ``sparsify``."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from commands import fails
from own_net import CONFIG, SPARSIFY

from apps.cli import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two configurations and a finished run of each: ``dense`` and ``sparse``."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "own.yaml").write_text(CONFIG)
    (folder / "sparsify.yaml").write_text(SPARSIFY)
    own, section = ("--config", str(folder / "own.yaml")), ("--config", str(folder / "sparsify.yaml"))
    assert main(["fit", *own, "--run_dir", str(folder / "dense")]) == 0
    assert main(["fit", *own, *section, "--run_dir", str(folder / "sparse")]) == 0
    return folder


def sparse(folder: Path, run: str = "sparse") -> list[str]:
    names = ("own.yaml", "sparsify.yaml")
    return [*(word for name in names for word in ("--config", str(folder / name))), "--run_dir", str(folder / run)]


def weights(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["state_dict"]


def test_fit_says_what_it_has_replaced(folder, capsys) -> None:
    assert main(["fit", *sparse(folder, "again"), "--trainer.max_epochs", "1"]) == 0
    shown = capsys.readouterr().out
    assert "1 of 1 feed-forward networks are sparse" in shown
    assert "best val_acc" in shown


def test_the_runs_configuration_has_the_section_and_no_other_run_has_one(folder) -> None:
    section = yaml.safe_load((folder / "sparse" / "config.yaml").read_text())["sparsify"]
    assert section["moe"]["num_experts"] == 4
    assert section["moe"]["router"]["init_args"]["expert_bias"] is True
    assert "sparsify" not in yaml.safe_load((folder / "dense" / "config.yaml").read_text())


def test_a_resumed_run_has_the_weights_of_an_unbroken_one(folder) -> None:
    assert main(["fit", *sparse(folder, "broken"), "--trainer.max_epochs", "1"]) == 0
    assert main(["fit", *sparse(folder, "broken"), "--ckpt_path", "last"]) == 0
    whole, resumed = (weights(folder / run / "checkpoints" / "last.ckpt") for run in ("sparse", "broken"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_a_test_makes_the_sparse_model_again(folder, capsys) -> None:
    assert main(["test", *sparse(folder)]) == 0
    shown = capsys.readouterr().out
    assert "test_acc" in shown
    assert "Routing in the test" in (folder / "sparse" / "report.html").read_text()
    beside = ["--config", str(folder / "sparse" / "config.yaml"), "--ckpt_path", str(folder / "sparse")]
    assert main(["test", *beside, "--run_dir", str(folder / "tested")]) == 0


def test_a_flag_overrides_the_section(folder) -> None:
    flags = ["--sparsify.moe.num_experts", "2", "--sparsify.moe.router", "core.ExpertChoice"]
    flags += ["--sparsify.moe.balance.load_balancing", "0", "--sparsify.exact=false"]
    assert main(["fit", *sparse(folder, "flagged"), *flags, "--trainer.max_epochs", "1"]) == 0
    section = yaml.safe_load((folder / "flagged" / "config.yaml").read_text())["sparsify"]
    assert section["moe"]["num_experts"] == 2
    assert section["moe"]["router"]["class_path"] == "core.ExpertChoice"


def test_a_checkpoint_that_is_not_of_this_section_is_refused(folder, capsys) -> None:
    dense = ("--config", str(folder / "own.yaml"))
    line = fails(capsys, 1, "test", *dense, "--run_dir", str(folder / "sparse"))
    assert "holds a model that was made sparse: give the section sparsify" in line
    line = fails(capsys, 1, "test", *sparse(folder, "dense"))
    assert "its own_net.Net was not made sparse: leave sparsify out" in line
    line = fails(capsys, 1, "test", *sparse(folder), "--sparsify.moe.num_experts", "8")
    assert "sparsify.moe.num_experts=4 in the checkpoint, 8 here" in line


def test_a_wrong_section_is_refused_in_one_line(folder, capsys) -> None:
    line = fails(capsys, 2, "fit", *sparse(folder, "new"), "--sparsify.moe.num_expert", "8")
    assert "num_expert" in line
    line = fails(capsys, 1, "fit", *sparse(folder, "new"), "--sparsify.modules", "layers.*")
    assert line.startswith("modules='layers.*' names no module; the model's feed-forward networks are blocks.0")
    line = fails(capsys, 1, "fit", *sparse(folder, "new"), "--model.by_hand", "true")
    assert "Net optimizes by hand" in line
    line = fails(capsys, 1, "fit", *sparse(folder, "other"), "--sparsify.metric", "val_accuracy")
    assert line.startswith("sparsify.metric='val_accuracy' is not what validation logs, which is ")
    assert "val_acc" in line.partition("which is ")[2].split(", ")
    assert "routing/" not in line
    line = fails(
        capsys, 1, "convert", "densify", "--ckpt_path", str(folder / "sparse"), "--output", str(folder / "new")
    )
    assert "is of no model of the suite: convert a model of your own in a script" in line
    assert not (folder / "new").exists()
