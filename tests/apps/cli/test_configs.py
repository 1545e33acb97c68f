"""Configurations: where they are, one laid over another, and the defaults of the classes they name."""

from __future__ import annotations

from pathlib import Path

import pytest

import core
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
