"""A training that begins with the weights of a model of fewer experts."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tiny_app import CONFIG, TinyData, TinyModule
from tiny_runs import copy_run
from trainings import MOE, fit, load

import core
from apps.cli import main
from apps.train.optim.optimizers import OptimizerConfig
from apps.train.step.growing import GrowConfig, grow_from

LAYER = "net.3"
DECAYING = OptimizerConfig(lr=0.02, weight_decay=0.5, schedule="constant")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run of four experts, and its model."""
    folder = tmp_path_factory.mktemp("trained")
    torch.manual_seed(0)
    fit(module := TinyModule(3, moe=MOE, optimizer=OptimizerConfig(lr=0.02)), folder)
    return folder, module


def grown(folder, num_experts: int = 6, optimizer: OptimizerConfig = DECAYING, **options) -> TinyModule:
    moe = dataclasses.replace(MOE, num_experts=num_experts)
    return TinyModule(3, moe=moe, optimizer=optimizer, grow=GrowConfig(str(folder), **options))


def rows(module: TinyModule) -> dict[str, torch.Tensor]:
    """Return the tensors of the layer that have a row for each expert."""
    layer = dict(module.named_modules())[LAYER]
    return {name: p.detach().clone() for name, p in layer.named_parameters()}


def test_the_weights_are_the_trained_model_s_and_the_new_experts_are_this_model_s(trained):
    folder, old = trained
    module = grown(folder)
    before = rows(module)
    assert grow_from(module, module.grow, None) == {LAYER: [0, 1, 2, 3]}
    assert torch.equal(module.net[0].weight, old.net[0].weight)
    for name, value in rows(module).items():
        assert torch.equal(value[:4], rows(old)[name]), name
        if name.startswith("experts"):
            assert torch.equal(value[4:], before[name][4:]), name


@pytest.mark.parametrize("name", ["adamw", "muon", "row_adam"])
def test_frozen_experts_stay_under_weight_decay_and_the_rest_learns(trained, tmp_path, name):
    folder, old = trained
    module = grown(folder, optimizer=dataclasses.replace(DECAYING, name=name))
    fit(module, tmp_path, gradient_clip_val=1.0)
    for parameter, value in rows(module).items():
        assert torch.equal(value[:4], rows(old)[parameter]), parameter
        assert value[4:].isfinite().all()
    assert not torch.equal(module.net[0].weight, old.net[0].weight)


def test_what_is_not_frozen_learns(trained, tmp_path):
    folder, old = trained
    fit(module := grown(folder, freeze=False), tmp_path)
    assert not torch.equal(rows(module)["experts.w_in"][:4], rows(old)["experts.w_in"])
    assert "frozen_experts" not in load(tmp_path / "last.ckpt")


def test_a_resumed_run_goes_on_as_one_run_without_the_trained_model(trained, tmp_path):
    folder, old = trained
    for name, epochs in (("whole", 2), ("parts", 1)):
        torch.manual_seed(1)
        whole_or_part = grown(folder)
        fit(whole_or_part, tmp_path / name, max_epochs=epochs)
    rest = grown(tmp_path / "gone")
    rest.starts_afresh = False  # as the command line says it where a run resumes a checkpoint
    fit(rest, tmp_path / "parts", max_epochs=2, ckpt_path=str(tmp_path / "parts" / "last.ckpt"))
    whole = load(tmp_path / "whole" / "last.ckpt")["state_dict"]
    torch.testing.assert_close(rest.state_dict(), whole, rtol=0, atol=0)
    assert torch.equal(rows(rest)["experts.w_in"][:4], rows(old)["experts.w_in"])
    assert load(tmp_path / "parts" / "last.ckpt")["frozen_experts"] == {LAYER: [0, 1, 2, 3]}


def test_copies_are_of_the_most_used_experts(trained):
    folder, old = trained
    module, data = grown(folder, start="copy"), TinyData()
    grow_from(module, module.grow, data.val_dataloader())
    with torch.no_grad(), core.record(old.eval()) as tape:
        for x, _ in data.val_dataloader():
            old(x)
    loads_E = sum(entry.routing.chosen_per_expert_E for entry in tape.entries)
    assert int(loads_E.sum()) == 2 * 24  # two experts for each of 24 points
    best = loads_E.argsort(descending=True, stable=True)[:2]
    assert torch.equal(rows(module)["experts.w_in"][4:], rows(old)["experts.w_in"][best])
    with pytest.raises(ValueError, match="there are none"):
        grow_from(module, module.grow, None)


WIDER = dataclasses.replace(MOE, num_experts=6, expert=core.FFN(hidden_dim=9, bias=True))
REFUSED = {
    "fewer": ({"moe": dataclasses.replace(MOE, num_experts=3)}, r"num_experts=3 of net\.3 is below the 4 of"),
    "as many": ({"moe": MOE}, "model.grow adds no expert"),
    "wider experts": ({"moe": WIDER}, r"net\.3\.experts\.w_in is \(6, 8, 8\) there and \(6, 8, 9\) here"),
    "another router": (
        {"moe": core.MoEConfig(6, core.TokenChoice(1), MOE.expert)},
        r"router=TokenChoice\(top_k=1,.* of net\.3 is TokenChoice\(top_k=2,",
    ),
    "no layer": ({"moe": None}, r"net\.3 is an MoE layer of the checkpoint alone"),
}


@pytest.mark.parametrize(("options", "message"), REFUSED.values(), ids=REFUSED)
def test_models_that_do_not_fit_are_refused(trained, options, message):
    module = TinyModule(3, **options)
    with pytest.raises(ValueError, match=message):
        grow_from(module, GrowConfig(str(trained[0])), None)


def test_another_kind_of_model_and_a_fixed_table_are_refused(trained, tmp_path):
    class OtherModule(TinyModule):
        pass

    with pytest.raises(
        ValueError, match=r"holds a model of class tiny_app\.TinyModule, and this run's is of class .*OtherModule"
    ):
        grow_from(OtherModule(3, moe=MOE), GrowConfig(str(trained[0])), None)
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        grow_from(grown(tmp_path / "gone"), GrowConfig(str(tmp_path / "gone")), None)
    random = core.MoEConfig(4, core.Random(), core.FFN(8))
    fit(TinyModule(3, moe=random), tmp_path)
    with pytest.raises(ValueError, match="cannot grow: no row of a gate stands for each expert alone"):
        module = TinyModule(3, moe=dataclasses.replace(random, num_experts=5))
        grow_from(module, GrowConfig(str(tmp_path)), None)


def test_a_grown_model_keeps_the_encoding_of_the_data_it_was_trained_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    named = CONFIG.replace("TinyModule", "NamingModule").replace("TinyData, init_args: {n: 24}", "NamedData")
    for file, text in (("few.yaml", named), ("more.yaml", named), ("names.txt", "red green blue")):
        (tmp_path / file).write_text(text)
    assert main(["fit", "--config", "few.yaml"]) == 0
    (tmp_path / "names.txt").write_text("one two three")
    grow = ["--model.moe.num_experts", "5", "--model.grow.checkpoint", "runs/few"]
    assert main(["fit", "--config", "more.yaml", *grow]) == 0
    arguments = load(tmp_path / "runs/more/checkpoints/last.ckpt")["hyper_parameters"]
    assert arguments["names"]["words"] == ["red", "green", "blue"]


def test_the_command_line_grows_tests_and_resumes(tmp_path, tmp_path_factory):
    few = copy_run(tmp_path_factory, tmp_path)
    overlay = f"model: {{init_args: {{moe: {{num_experts: 6}}, grow: {{checkpoint: {few}}}}}}}"
    (tmp_path / "growing.yaml").write_text(overlay)
    config = ["--config", str(tmp_path / "tiny.yaml"), "--config", str(tmp_path / "growing.yaml")]
    where = [*config, "--run_dir", str(tmp_path / "more")]
    assert main(["fit", *where]) == 0
    (few / "checkpoints" / "best.ckpt").rename(tmp_path / "few.ckpt")
    assert main(["test", *where]) == 0
    assert main(["fit", *where, "--ckpt_path", "last", "--trainer.max_epochs", "2"]) == 0
    old, new = (load(path)["state_dict"] for path in (tmp_path / "few.ckpt", tmp_path / "more/checkpoints/last.ckpt"))
    assert torch.equal(new["net.3.experts.w_in"][:4], old["net.3.experts.w_in"])
    assert not torch.equal(new["net.0.weight"], old["net.0.weight"])
