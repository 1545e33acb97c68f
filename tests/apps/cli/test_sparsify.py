"""``moesaic fit`` and ``test`` of a LightningModule of the user's own, with the section ``sparsify``."""

from __future__ import annotations

from pathlib import Path

import own_net
import pytest
import torch
import yaml
from commands import fails
from own_net import CONFIG, SPARSIFY

import apps
import core
from apps.base.files import CONFIGS
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


def test_the_runs_configuration_has_the_section_which_a_flag_overrides(folder) -> None:
    section = yaml.safe_load((folder / "sparse" / "config.yaml").read_text())["sparsify"]
    assert section["moe"]["num_experts"] == 4
    assert section["moe"]["router"]["init_args"]["expert_bias"] is True
    assert "sparsify" not in yaml.safe_load((folder / "dense" / "config.yaml").read_text())
    flags = ["--sparsify.moe.num_experts", "2", "--sparsify.moe.router", "core.ExpertChoice"]
    flags += ["--sparsify.moe.balance.load_balancing_loss", "0", "--sparsify.exact=false"]
    assert main(["fit", *sparse(folder, "flagged"), *flags, "--trainer.max_epochs", "1"]) == 0
    section = yaml.safe_load((folder / "flagged" / "config.yaml").read_text())["sparsify"]
    assert section["moe"]["num_experts"] == 2
    assert section["moe"]["router"]["class_path"] == "core.ExpertChoice"


def test_fit_says_what_it_has_replaced_and_a_resumed_run_has_the_weights_of_an_unbroken_one(folder, capsys) -> None:
    assert main(["fit", *sparse(folder, "broken"), "--trainer.max_epochs", "1"]) == 0
    shown = capsys.readouterr().out
    assert "1 of 1 feed-forward networks are sparse" in shown
    assert "best val_acc" in shown
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
    line = fails(capsys, 1, "fit", *sparse(folder, "other"), "--sparsify.metric", "val_accuracy")
    assert line.startswith("sparsify.metric='val_accuracy' is not what validation logs, which is ")
    assert "val_acc" in line.partition("which is ")[2].split(", ")
    assert "routing/" not in line


def convert(folder: Path, kind: str, *options: str) -> list[str]:
    config = str(folder / "sparse" / "config.yaml")
    new = str(folder / "-".join(("converted", kind, *options)).replace("--", ""))
    return ["convert", kind, "--ckpt_path", str(folder / "sparse"), "--config", config, "--output", new, *options]


def converted(folder: Path, kind: str, *options: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Convert the sparse run, test the new one, and return the tensors of both."""
    argv = convert(folder, kind, *options)
    assert main(argv) == 0
    new = Path(argv[7])
    assert (
        main(["test", "--ckpt_path", str(new), "--config", str(new / "config.yaml"), "--run_dir", f"{new}_test"]) == 0
    )
    return tuple(weights(path / "checkpoints" / "best.ckpt") for path in (folder / "sparse", new))


@pytest.mark.parametrize("options", [("densify",), ("densify", "--how", "use"), ("specialize", "--expert", "1")])
def test_a_run_made_sparse_becomes_the_users_dense_module(folder, options) -> None:
    old, new = converted(folder, *options)
    w_in_EDF = old["blocks.0.moe.experts.w_in"]
    if options == ("densify",):
        assert torch.allclose(new["blocks.0.0.weight"], w_in_EDF.mean(0).t(), rtol=1e-6, atol=0)
    elif options[0] == "specialize":
        assert torch.equal(new["blocks.0.0.weight"], w_in_EDF[1].t())
        assert torch.equal(new["blocks.0.2.bias"], old["blocks.0.moe.experts.b_out"][1])
    assert new.keys() == own_net.Net().state_dict().keys()
    assert all(torch.equal(new[name], old[name]) for name in new if not name.startswith("blocks"))


def test_a_run_made_sparse_keeps_the_experts_that_are_used_most(folder) -> None:
    old, new = converted(folder, "prune", "--keep", "3", "--by", "use")
    w_in_EDF, kept_EDF = (state["blocks.0.moe.experts.w_in"] for state in (old, new))
    place = [next(e for e in range(4) if torch.equal(w_in_EDF[e], kept_DF)) for kept_DF in kept_EDF]
    assert place == sorted(set(place))
    gate = "blocks.0.moe.router.gate.weight"
    assert torch.equal(new[gate], old[gate][place])
    points = torch.cat([batch[0] for batch in own_net.Points().val_dataloader()])
    loaded = apps.load(folder / "sparse")
    with torch.no_grad(), core.record(loaded) as tape:
        loaded(points)
    chosen_E = tape.entries[0].routing.chosen_per_expert_E
    (gone,) = {*range(4)} - {*place}
    assert int(chosen_E[gone]) == int(chosen_E.min())


def test_a_conversion_that_is_not_for_a_users_module_writes_nothing(folder, capsys) -> None:
    lora = str(CONFIGS / "experts" / "lora.yaml")
    argv = convert(folder, "adapt", "--moe", lora, "--modules", "head")
    line = fails(capsys, 1, *argv)
    assert "is of a model of your own, which densify, prune and specialize take, not adapt" in line
    assert not Path(argv[7]).exists()
    narrow = [
        "--sparsify.start",
        "split",
        "--sparsify.exact=false",
        "--sparsify.moe.router.init_args.expert_bias=false",
    ]
    assert main(["fit", *sparse(folder, "narrow"), *narrow, "--trainer.max_epochs", "1"]) == 0
    argv = convert(folder, "densify")
    argv[3], argv[5], argv[7] = (str(folder / name) for name in ("narrow", "narrow/config.yaml", "wide"))
    line = fails(capsys, 1, *argv)
    assert "hidden_dim=16" in line
    assert "hidden_dim=4" in line
    assert not (folder / "wide").exists()
