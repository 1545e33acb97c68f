"""Each conversion of a run of two blocks, the second one sparse, and what a user may get wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from commands import fails, full_disk
from converted import DIGITS, IMAGES, TRAINER, write_run
from torch.testing import assert_close

import apps
import core
from apps.cli import main
from apps.cli.request import Request
from apps.train.checkpoint.contents import read_checkpoint
from apps.train.cost.quantizing import quantize_model
from apps.vision.backbone import TimmConfig
from apps.vision.module import VisionClassifier

LAYER = "model.blocks.1.mlp"


def convert(kind, *runs, output, batches=0, **options):
    """Run a conversion that has to succeed, and return the new model and its tensors."""
    words = [word for name, value in options.items() for word in (f"--{name}", *str(value).split())]
    argv = ["convert", kind, "--ckpt_path", *map(str, runs), "--output", str(output), "--batches", str(batches)]
    assert main([*argv, *words]) == 0
    return apps.load(output), state_of(output)


def state_of(run):
    return read_checkpoint(Path(run) / "checkpoints" / "best.ckpt")["state_dict"]


@torch.no_grad()
def outputs(model):
    return model(IMAGES)


def test_a_pruned_run_is_shown_beside_the_old_one_and_tested_as_any_other(runs, tmp_path, capsys):
    new, state = convert("prune", runs / "sparse", output=tmp_path / "new", keep=2, by="use", batches=1)
    table = capsys.readouterr().out
    num_params = sum(p.numel() for p in apps.load(runs / "sparse").parameters())
    # The gate (8 x 4) and four experts of 8 x 16 + 16 + 16 x 8 + 8 lose half.
    assert [f"{num_params:,}", f"{num_params - 16 - 2 * 280:,}"] in [line.split()[1:] for line in table.splitlines()]
    assert all(f"\n{row} " in table for row in ("weights, MB", "active parameters", "MFLOPs an image", "val/top1"))
    assert new.moe.num_experts == 2
    assert state[f"{LAYER}.experts.w_in"].shape == (2, 8, 16)
    assert main(["test", "--ckpt_path", str(tmp_path / "new"), "--trainer.limit_test_batches", "1"]) == 0
    assert 0 <= json.loads((tmp_path / "new" / "test.json").read_text())["test/top1"] <= 1
    config = yaml.safe_load((tmp_path / "new" / "config.yaml").read_text())
    assert config["run_dir"] == str(tmp_path / "new")
    assert config["model"]["init_args"]["moe"]["num_experts"] == 2


def test_a_strangers_callbacks_do_not_come_along(runs, tmp_path, capsys):
    shutil.copytree(runs / "sparse", tmp_path / "got")
    beside = tmp_path / "got" / "config.yaml"
    config = yaml.safe_load(beside.read_text())
    config["trainer"]["callbacks"] = r'[{"class_path": "planted\u002eModule"}]'
    config["trainer"]["logger"] = {"class_path": "planted.It"}
    beside.write_text(yaml.safe_dump(config))
    convert("densify", tmp_path / "got", output=tmp_path / "new", batches=1)
    assert "left out: trainer.callbacks, trainer.logger (--config" in capsys.readouterr().err
    assert yaml.safe_load((tmp_path / "new" / "config.yaml").read_text())["trainer"] == TRAINER


def test_a_dense_run_has_the_mean_of_the_experts_or_one_of_them(runs, tmp_path):
    new, state = convert("densify", runs / "sparse", output=tmp_path / "new")
    old = state_of(runs / "sparse")
    assert new.moe is None
    assert_close(state[f"{LAYER}.fc1.weight"], old[f"{LAYER}.experts.w_in"].mean(0).t())
    assert_close(state[f"{LAYER}.fc2.bias"], old[f"{LAYER}.experts.b_out"].mean(0))
    one, _ = convert("specialize", runs / "sparse", output=tmp_path / "one", expert=2)
    for made, by_hand in ((new, core.densify), (one, lambda model: core.cut_out(model, expert=2))):
        dense = apps.load(runs / "sparse")
        dense.model = by_hand(dense.model)
        assert_close(outputs(made), outputs(dense))


@pytest.mark.parametrize("start", ["copy", "drop"])
def test_an_upcycled_run_begins_as_the_dense_one(runs, tmp_path, start):
    moe = runs / "moe.yaml"
    new, state = convert("upcycle", runs / "dense", output=tmp_path / "new", moe=moe, start=start)
    assert new.moe.num_experts == 2
    assert new.moe.expert == core.FFN(hidden_dim=32, bias=True)
    same = torch.equal(*state[f"{LAYER}.experts.w_in"])
    assert same == (start == "copy")
    assert torch.allclose(outputs(new), outputs(apps.load(runs / "dense")), atol=1e-5) == same


def test_the_mean_of_two_runs(runs, tmp_path):
    _, state = convert("merge", runs / "dense", runs / "other", output=tmp_path / "new", weights="1 3")
    a, b = state_of(runs / "dense"), state_of(runs / "other")
    assert state.keys() == a.keys()
    assert not torch.equal(a["model.head.weight"], b["model.head.weight"])
    for name, value in state.items():
        assert_close(value, 0.25 * a[name] + 0.75 * b[name])


def test_two_runs_as_the_experts_of_one_with_gates_of_their_own_examples(runs, tmp_path):
    both, options = (runs / "dense", runs / "other"), {"how": "btx", "moe": runs / "moe.yaml"}
    new, random = convert("merge", *both, output=tmp_path / "random", **options)
    a, b = state_of(runs / "dense"), state_of(runs / "other")
    for e, own in enumerate((a, b)):
        assert_close(random[f"{LAYER}.experts.w_in"][e], own[f"{LAYER}.fc1.weight"].t(), rtol=0, atol=0)
    assert_close(random["model.head.weight"], (a["model.head.weight"] + b["model.head.weight"]) / 2)
    assert new.moe.num_experts == 2
    _, state = convert("merge", *both, output=tmp_path / "new", batches=1, gates="examples", **options)
    gate_ED = state[f"{LAYER}.router.gate.weight"]
    assert_close(gate_ED.norm(dim=1), torch.ones(2))
    # Both runs have the same validation images, which their mean reads.
    assert_close(gate_ED[0], gate_ED[1])
    assert not torch.equal(random[f"{LAYER}.router.gate.weight"], gate_ED)
    assert torch.equal(random[f"{LAYER}.experts.w_in"], state[f"{LAYER}.experts.w_in"])


def test_an_expert_is_opted_out_and_all_else_stays(runs, tmp_path, capsys):
    new, state = convert("prune", runs / "sparse", output=tmp_path / "new", without="2 0")
    old = state_of(runs / "sparse")
    for name, value in state.items():
        own = old[name][[1, 3]] if value.shape != old[name].shape else old[name]
        assert torch.equal(value, own)
    assert state[f"{LAYER}.experts.w_in"].shape[0] == new.moe.num_experts == 2
    argv = ("convert", "prune", "--ckpt_path", str(runs / "sparse"), "--output", str(tmp_path / "no"), "--batches", "0")
    assert "--without='7' is not one of 0, 1, 2, 3" in fails(capsys, 1, *argv, "--without", "7")
    assert "one of --keep and --without says which experts stay" in fails(capsys, 2, *argv)
    assert "one of --keep and --without" in fails(capsys, 2, *argv, "--without", "1", "--keep", "2")
    assert "is merged or becomes a constant" in fails(capsys, 2, *argv, "--keep", "2", "--constants", "--merge")
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("how, batches, dtype", [("int8", 0, torch.int8), ("int4:8", 1, torch.uint8)])
def test_quantized_experts_are_stored_as_integers(runs, tmp_path, how, batches, dtype, capsys):
    new, state = convert("quantize", runs / "sparse", output=tmp_path / "new", how=how, batches=batches)
    assert "moesaic test --ckpt_path" in capsys.readouterr().out
    assert state[f"{LAYER}.experts.w_in.values"].dtype == dtype
    assert f"{LAYER}.experts.w_in" not in state
    assert torch.equal(outputs(new), outputs(quantize_model(apps.load(runs / "sparse"), how)))
    argv = ("convert", "quantize", "--ckpt_path", str(tmp_path / "new"), "--output", str(tmp_path / "twice"))
    assert "are quantized already" in fails(capsys, 1, *argv, "--batches", "0")


def test_updates_train_and_nothing_else(runs, tmp_path):
    options = {"moe": runs / "lora.yaml", "modules": "*.attn.qkv"}
    new, before = convert("adapt", runs / "dense", output=tmp_path / "new", **options)
    assert_close(outputs(new), outputs(apps.load(runs / "dense")))
    assert all(p.requires_grad == (".updates." in name) for name, p in new.named_parameters())
    assert main(["fit", "--weights", str(tmp_path / "new"), "--run_dir", str(tmp_path / "tuned")]) == 0
    after = state_of(tmp_path / "tuned")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(".updates." in name for name in changed)
    assert not torch.equal(outputs(apps.load(tmp_path / "tuned")), outputs(new))


@pytest.fixture
def adapted(runs, tmp_path):
    """A function that makes a run whose updates, of an overlay, are no longer at their start."""

    def make(overlay):
        options = {"moe": runs / f"{overlay}.yaml", "modules": "*.attn.qkv *.fc1"}
        convert("adapt", runs / "dense", output=tmp_path / overlay, **options)
        file = tmp_path / overlay / "checkpoints" / "best.ckpt"
        checkpoint = torch.load(file, weights_only=True)
        for name, value in checkpoint["state_dict"].items():
            if ".updates.experts." in name:
                value.normal_()
        torch.save(checkpoint, file)
        return tmp_path / overlay

    return make


def test_updates_of_one_gate_become_a_part_of_the_layers(runs, tmp_path, adapted, capsys):
    old = apps.load(adapted("one_update"))
    new, state = convert("merge", tmp_path / "one_update", output=tmp_path / "new")
    assert_close(outputs(new), outputs(old))
    assert not torch.allclose(outputs(new), outputs(apps.load(runs / "dense")))
    assert state.keys() == state_of(runs / "dense").keys()
    assert all(p.requires_grad for p in new.parameters())
    sizes = [f"{sum(p.numel() for p in model.parameters()):,}" for model in (old, new)]
    assert sizes in [line.split()[1:] for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize("how, batches", [("average", 0), ("use", 1)])
def test_a_dense_run_has_the_mean_of_the_updates(tmp_path, adapted, how, batches):
    dense = apps.load(adapted("lora"))
    new, _ = convert("densify", tmp_path / "lora", output=tmp_path / "new", how=how, batches=batches)
    # Two of two updates a token: the loads are equal.
    assert_close(outputs(new), outputs(core.merge_adapters(core.densify(dense))))


def test_what_no_run_with_updates_becomes_is_one_line(runs, tmp_path, adapted, capsys):
    run = str(adapted("lora"))
    there = sorted(path.name for path in tmp_path.iterdir())
    end = ["--output", str(tmp_path / "new"), "--batches", "0"]
    for argv, message in (
        (["merge"], "the adapters cannot be merged: router TokenChoice gives tokens gates of their own: densify"),
        (["merge", "--weights", "1"], "--how, --weights and --moe are for several runs"),
        (["merge", str(runs / "dense")], "merge them first, by moesaic convert merge"),
        (["prune", "--keep", "1"], "has adapters on its linear layers"),
        (["adapt", "--moe", str(runs / "lora.yaml"), "--modules", "*"], "has adapters on its linear layers"),
    ):
        assert message in fails(capsys, 1, "convert", argv[0], "--ckpt_path", run, *argv[1:], *end)
    assert sorted(path.name for path in tmp_path.iterdir()) == there


def test_a_backbone_is_made_dense_and_sparse_again_in_the_place_of_its_own_networks(runs, tmp_path):
    moe = core.MoEConfig(4, core.TokenChoice(top_k=2))
    module = VisionClassifier(backbone=TimmConfig("test_vit"), moe=moe, moe_blocks=[-1], image_size=16, report=None)
    write_run(tmp_path / "run", module, DIGITS)
    dense, _ = convert("densify", tmp_path / "run", output=tmp_path / "dense")
    again, _ = convert("upcycle", tmp_path / "dense", output=tmp_path / "again", moe=runs / "moe.yaml")
    x = torch.randn(2, 1, 16, 16)
    assert (len(core.moe_layers(dense)), len(core.moe_layers(again))) == (0, 1)
    assert_close(again(x), dense(x))


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["prune", "--keep", "two"], 2, "'two' is neither an integer nor a share such as 0.5"),
        (["prune", "--keep", "2"], 1, "--batches 0 leaves out the statistics"),
        (["prune", "--keep", "2", "--kept", "3"], 2, "kept does not exist; did you mean 'keep'?"),
        (["densify", "--how", "mean"], 1, "how='mean' is not one of average, use"),
        (["densify", "--how", "use"], 1, "--batches 0 leaves out the loads that --how use needs"),
        (["upcycle", "--moe", "moe.yaml"], 1, "is sparse already"),
        (["adapt", "--moe", "moe.yaml", "--modules", "*.qkv"], 1, "moe.yaml has no model.moe.expert, which is an upd"),
        (["upcycle", "--ckpt_path", "conv", "--moe", "moe.yaml"], 1, "no module 'model.groups.1.ffn.mlp' that could"),
        (["upcycle", "--moe", "missing.yaml"], 2, "no configuration missing.yaml"),
        (["specialize"], 1, "one of --task, --domain, --expert, --pair and --keep"),
        (["specialize", "--task", "0"], 1, "does not decide by the task alone"),
        (["specialize", "--pair", "en-de"], 1, "VisionClassifier knows no parts of its data by name"),
        (["merge"], 2, "is one run: merge takes two or more"),
        (["merge", "--ckpt_path", "dense", "sparse"], 1, f"lacks {LAYER}."),
        (["melt"], 2, "invalid choice: 'melt'"),
    ],
)
def test_what_cannot_be_converted_is_one_line(runs, tmp_path, monkeypatch, capsys, argv, code, message):
    monkeypatch.chdir(runs)
    run = ["--ckpt_path", "sparse", "--output", str(tmp_path / "new"), "--batches", "0"]
    assert message in fails(capsys, code, "convert", *argv[:1], *run, *argv[1:])
    assert list(tmp_path.iterdir()) == []


def test_a_run_with_other_tensors_than_its_model_is_not_converted(runs, tmp_path, capsys):
    checkpoint = torch.load(runs / "dense" / "checkpoints" / "best.ckpt", weights_only=True)
    checkpoint["state_dict"]["foreign"] = checkpoint["state_dict"].pop("model.head.bias")
    torch.save(checkpoint, tmp_path / "other.ckpt")
    argv = ["convert", "upcycle", "--ckpt_path", str(tmp_path / "other.ckpt"), "--moe", str(runs / "moe.yaml")]
    line = fails(capsys, 1, *argv, "--batches", "0", "--output", str(tmp_path / "new"))
    assert line.endswith("the checkpoint lacks model.head.bias; the model lacks foreign")
    assert not (tmp_path / "new").exists()


def test_nothing_is_overwritten_and_a_full_disk_leaves_nothing(runs, tmp_path, capsys):
    argv = ["convert", "densify", "--ckpt_path", str(runs / "sparse"), "--batches", "0", "--output"]
    (tmp_path / "there").mkdir()
    line = fails(capsys, 2, *argv, str(tmp_path / "there"))
    assert line.endswith("exists: it stays as it is; give a new folder")
    with full_disk(4096):
        assert "best.ckpt" in fails(capsys, 1, *argv, str(tmp_path / "new"))
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_a_checkpoint_without_a_configuration_has_no_batches_and_one_without_an_optimizer_goes_not_on(
    runs, tmp_path, capsys
):
    bare, new = shutil.copy(runs / "sparse" / "checkpoints" / "best.ckpt", tmp_path / "bare.ckpt"), tmp_path / "new"
    argv = ["convert", "densify", "--ckpt_path", str(bare), "--output", str(new)]
    assert "give --config FILE, or --batches 0" in fails(capsys, 1, *argv)
    assert main([*argv, "--batches", "0"]) == 0
    assert apps.load(new).moe is None
    assert main(["fit", "--ckpt_path", str(new), "--run_dir", str(tmp_path / "on")]) == 2
    assert "has no optimizer state to continue with: start a new run with --weights" in capsys.readouterr().err
    assert "is an option of fit" in fails(capsys, 2, "test", "--weights", str(new))
    assert Request.read("fit", ["--weights", str(new)]).run_dir == Path("runs", "new_tuned")
