"""Options and classes by their old names: in Python, configurations, commands and checkpoints."""

from __future__ import annotations

import json
import logging
import pickle
from pathlib import Path

import pytest
import torch
import yaml
from places import ROOT
from shown_runs import RUNS

import apps
import core
import moesaic
from apps import registry
from apps.cli import main
from apps.cli.classes import with_long_names, with_short_names
from apps.cli.configs import read_config
from apps.cli.options import Fit
from apps.cli.train import build
from apps.compare.options import Command as Compare
from apps.convert.options import Options as Convert
from apps.data.datasets import Dataset
from apps.demonstrate.command import data_of
from apps.nlp.decode import DecodeConfig, decoding, one_each
from apps.plan.options import Options as Plan
from apps.recsys.schema import NegativesConfig
from apps.recsys.sequence.module import NextItemRecommender
from apps.serve.export.options import Options as Export
from apps.train.publish.exported import Description
from apps.train.sharded.expert_parallel import ExpertParallelStrategy
from core import Threshold, TokenChoice, fields
from core.config.plain import from_plain


@pytest.fixture
def lines(caplog):
    """The log lines about old names."""
    registry.tell_renamed.cache_clear()
    fields.tell_renamed.cache_clear()
    caplog.set_level(logging.WARNING)
    return lambda: sorted(r.getMessage() for r in caplog.records if "the old name works until" in r.getMessage())


def told(old: str, new: str) -> str:
    return f"{old} is now called {new}; the old name works until version 0.2"


def test_python_takes_an_old_keyword_with_one_line(lines):
    for _ in range(2):
        strategy = ExpertParallelStrategy(experts=2, rest="shard")
    assert (strategy.expert_parallel_size, strategy.non_experts) == (2, "shard")
    assert lines() == [told("experts", "expert_parallel_size"), told("rest", "non_experts")]
    with pytest.raises(ValueError, match="experts is the old name of expert_parallel_size: give"):
        ExpertParallelStrategy(experts=2, expert_parallel_size=2)


def test_a_configuration_is_read_with_new_names_with_one_line(tmp_path: Path, lines):
    strategy = {"class_path": "ExpertParallelStrategy", "init_args": {"shards": 2, "nodes": 1}}
    (tmp_path / "old.yaml").write_text(yaml.safe_dump({"trainer": {"strategy": strategy}, "model": {"experts": 1}}))
    for _ in range(2):
        config = read_config(tmp_path / "old.yaml")
    assert config["trainer"]["strategy"]["init_args"] == {"fsdp_size": 2, "nodes": 1}
    assert config["model"] == {"experts": 1}
    assert lines() == [told("strategy.shards", "strategy.fsdp_size")]


def test_a_command_line_takes_an_old_name_with_one_line(lines):
    flags = ["--trainer.strategy.hidden", "2", "--trainer.strategy.init_args.rest=shard", "--model.hidden", "3"]
    new = ("--trainer.strategy.expert_tensor_parallel_size", "2", "--trainer.strategy.init_args.non_experts=shard")
    assert Fit.read(flags).rest == (*new, "--model.hidden", "3")
    assert len(lines()) == 2


def test_a_command_takes_an_old_word_with_one_line(lines, tmp_path: Path):
    (tmp_path / "over.yaml").write_text("{}")
    text = "configs/nlp/text_mixtral_like.yaml"
    assert Plan.read(["-c", text, "--gpus", "8", "--gpu", "h100", "--static_exchange"]).static_all_to_all
    overlays = ["-c", str(tmp_path / "over.yaml"), f"--config={tmp_path / 'over.yaml'}"]
    assert len(Compare.read([text, *overlays]).overlays) == 2
    export = ["--ckpt_path", "run", "--output", str(tmp_path / "new"), "--form", "contrib"]
    assert Export.read(export).onnx_ops == "contrib"
    convert = ["specialise", "--ckpt_path", "run", "--output", str(tmp_path / "new"), "--expert", "1"]
    assert Convert.read(convert) == Convert.read(["specialize", *convert[1:]])
    new = {
        "--static_exchange": "--static_all_to_all",
        "-c": "--overlay",
        "--config": "--overlay",
        "--form": "--onnx_ops",
        "specialise": "specialize",
    }
    assert lines() == sorted(told(*names) for names in new.items())


def aged(value, section=""):
    """Return plain values with the old names of options."""
    if not isinstance(value, dict):
        return value
    sections = [names for end, names in registry.RENAMED.items() if f".{section}".endswith(f".{end}")]
    old = {new: name for names in sections for name, new in names.items()}
    return {old.get(k, k): aged(v, section if k == "init_args" else f"{section}.{k}") for k, v in value.items()}


def test_a_search_takes_an_old_option(lines):
    own = decoding(DecodeConfig(), {"beam_size": 3, "num_best": 2, "min_length": 4})
    assert (own.num_beams, own.num_return_sequences, own.min_new_tokens) == (3, 2, 4)
    assert from_plain({"beam_size": 3, "min_length": 4}, DecodeConfig) == DecodeConfig(num_beams=3, min_new_tokens=4)
    assert registry.new_name("model.decode.beam_size") == "model.decode.num_beams"
    with pytest.raises(ValueError, match="num_return_sequences=2: predict returns one text each"):
        one_each({"num_best": 2})
    expected = {"num_best": "num_return_sequences", "beam_size": "num_beams", "min_length": "min_new_tokens"}
    assert {told(*both) for both in expected.items()} <= set(lines())


def test_a_module_takes_an_old_keyword_and_a_subclass_keeps_its_own_arguments(lines):
    class Own(NextItemRecommender):
        def __init__(self, width: int = 3, **kwargs):
            super().__init__(**kwargs)

    for kind, own in ((NextItemRecommender, {}), (Own, {"width": 5})):
        model = kind(num_items=5, exclude_seen=True, train_unseen=True, **own)
        assert model.mask_seen_items
        assert model.hparams["mask_seen_items"]
        assert "train_unseen" not in model.hparams
        assert model.hparams.get("width") == own.get("width")
    assert lines() == [told("train_unseen", "mask_seen_items")]


def test_a_config_takes_an_old_field_in_python_and_as_plain_values(lines):
    options = {"kind": "items", "column": "film", "moves_with": ["year"]}
    assert NegativesConfig(**options) == from_plain(options, NegativesConfig)
    assert NegativesConfig(**options).item_features == ("year",)
    assert lines() == [told("moves_with", "item_features")]


def test_a_dataset_takes_the_old_spelling_of_its_license(lines):
    assert Dataset("d", "recsys", "", (), licence="MIT").license == "MIT"
    assert lines() == [told("licence", "license")]


def test_the_table_of_files_is_that_of_the_classes_and_the_same_name_elsewhere_stays():
    routers = {**TokenChoice.new_names, **Threshold.new_names}
    assert routers == registry.RENAMED["router"]
    plain = {"class_path": "core.TokenChoice", "init_args": {"top_k": 2, "second": "random"}}
    assert TokenChoice(2, second="random") == from_plain(plain) == TokenChoice(2, second_expert_policy="random")
    plain = {"optimizer": {"class_path": "mine.Adam", "init_args": {"warmup": 3}}, "hidden": {"rest": 1}}
    assert registry.of_today(plain) == plain
    assert registry.of_today({"model.optimizer.warmup": 3}) == {"model.optimizer.warmup_steps": 3}


def test_a_balance_takes_old_weights_in_python_and_everywhere_in_files(tmp_path: Path, lines):
    new = core.Balance(load_balancing_loss=0.5, router_z_loss=0.1)
    plain = {"load_balancing": 0.5, "router_z": 0.1}
    names = fields.OLD_TERMS
    assert core.Balance.new_names == names == registry.RENAMED["balance"] == registry.RENAMED["mixing_balance"]
    assert core.Balance(**plain) == new
    moe = core.MoEConfig.from_dict({"num_experts": 4, "balance": plain})
    assert moe.balance == new
    in_python = [told(*pair) for pair in names.items()]
    assert lines() == in_python
    (tmp_path / "old.yaml").write_text(yaml.safe_dump({"model": {"moe": {"balance": plain}, "mixing_balance": plain}}))
    model = read_config(tmp_path / "old.yaml")["model"]
    assert core.MoEConfig.from_dict({"num_experts": 4, **model["moe"]}) == moe
    assert model["mixing_balance"] == model["moe"]["balance"]
    for _ in range(2):
        flags = ("--model.moe.balance.router_z_loss=0.1", "--sparsify.moe.balance.load_balancing_loss", "0")
        assert Fit.read([word.replace("_loss", "") for word in flags]).rest == flags
    in_files = [told(f"{s}.{old}", f"{s}.{new}") for s in ("balance", "mixing_balance") for old, new in names.items()]
    assert lines() == sorted(in_python + in_files)


def test_a_router_and_a_pickled_tape_may_name_balance_losses_by_their_old_names(lines):
    class Old(core.TokenChoice):
        terms = frozenset({"router_z", "importance"})

    class Asked(core.TokenChoice):
        @property
        def terms(self):
            return frozenset({"router_z"})

    assert Old().terms == {"router_z_loss", "importance"}
    assert Asked().terms == {"router_z_loss"}
    layer = core.MoEConfig(4, core.TokenChoice(2), core.FFN(8), balance=core.Balance(router_z_loss=0.1)).build(8)
    with core.record(layer) as tape:
        layer(torch.ones(1, 3, 8))
    old = pickle.dumps(tape.detach(), protocol=0).replace(b"load_balancing_loss", b"load_balancing")
    old = old.replace(b"router_z_loss", b"router_z")
    assert core.aux_losses(pickle.loads(old)).terms == core.aux_losses(tape).terms
    assert len(lines()) == 2


def test_a_class_by_its_old_name_in_python_and_in_files(tmp_path: Path, lines):
    assert core.adapt is core.add_adapters
    assert core.Copy is core.Identity
    assert moesaic.Copy is core.Identity
    assert from_plain({"class_path": "core.Copy"}) == from_plain({"class_path": "Copy"}) == core.Identity()
    (tmp_path / "old.yaml").write_text("model: {moe: {expert: {class_path: core.Copy}}}")
    for _ in range(2):
        config = read_config(tmp_path / "old.yaml")
    assert config["model"]["moe"]["expert"] == {"class_path": "core.Identity"}
    copied = told("core.Copy", "core.Identity")  # one line of the engine, one of the command line
    assert lines() == [copied, copied, told("core.adapt", "core.add_adapters")]
    with pytest.raises(AttributeError, match="module 'core' has no attribute 'Copies'"):
        core.Copies  # noqa: B018


NAMES = (*registry.MODELS, *registry.DATA, *registry.TRAINER)


def earlier(path: str) -> str:
    """Return the path that an apps' class had before, in these tests."""
    long = registry.full_path(path) or path
    return f"apps.earlier.{long.rpartition('.')[2]}" if long.startswith("apps.") else path


@pytest.fixture
def moved(monkeypatch):
    """Every class of the apps has moved since."""
    configs = ("apps.multimodal.towers.towers.SingleTower", "apps.multimodal.towers.loss.SigmoidLoss")
    for name in (*NAMES, *configs):
        monkeypatch.setitem(registry.FORMER, earlier(name), name)


@pytest.mark.parametrize("name", RUNS)
def test_a_checkpoint_names_its_class_shortly_and_one_of_before_loads(name, tmp_path, moved, lines):
    run = RUNS[name](tmp_path)
    file = next((run / "checkpoints").iterdir())
    contents = torch.load(file, weights_only=True)
    short = contents["module_class"]
    assert short in registry.MODELS
    model = apps.load(run)
    plain = registry.renamed(contents["hyper_parameters"], earlier)
    torch.save({**contents, "module_class": earlier(short), "hyper_parameters": plain}, file)
    config = registry.renamed(read_config(run / "config.yaml"), earlier)
    assert str(config).count("apps.earlier.") >= 2
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    again = apps.load(run)
    assert type(again) is type(model)
    assert again.hparams == model.hparams
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in again.state_dict().items())
    assert type(data_of(run / "config.yaml", again)).__name__ in registry.DATA
    # With the old names of options there is one line each.
    plain = {**contents["hyper_parameters"], "optimizer": {"warmup_steps": 3}}
    for arguments in (plain, aged(plain, "model")):
        assert not lines()
        torch.save({**contents, "hyper_parameters": arguments}, file)
        model = apps.load(file)
        assert model.hparams["optimizer"]["warmup_steps"] == 3
    assert told("model.optimizer.warmup", "model.optimizer.warmup_steps") in lines()
    assert told("balance.router_z", "balance.router_z_loss") in lines()
    assert aged(dict(model.hparams), "model")["optimizer"]["warmup"] == 3
    assert all(line.count(" is now called ") == 1 for line in lines())
    assert len(lines()) == len(set(lines()))


def test_a_name_that_is_in_no_table_is_not_imported(tmp_path):
    run = RUNS["digits"](tmp_path)
    file = next((run / "checkpoints").iterdir())
    contents = torch.load(file, weights_only=True)
    for name in ("apps.earlier.VisionClassifier", "apps.vision.data.VisionClassifier", "Nobody"):
        torch.save({**contents, "module_class": name}, file)
        with pytest.raises(ValueError, match=f"holds a model of class {name}, which no app has"):
            apps.load(run)


def test_a_configuration_has_short_names_when_it_is_written_and_paths_of_today_when_read(tmp_path, moved):
    callback = {"class_path": earlier("RoutingDetail"), "init_args": {"a": 1}}
    data, tower = (
        {"class_path": earlier("TextData")},
        {"class_path": earlier("apps.multimodal.towers.towers.SingleTower")},
    )
    written = {"model": earlier("Translator"), "data": data, "tower": tower, "trainer": {"callbacks": [callback]}}
    (tmp_path / "old.yaml").write_text(yaml.safe_dump(written))
    config = with_long_names(read_config(tmp_path / "old.yaml"))
    assert config["model"] == registry.full_path("Translator")
    assert config["data"]["class_path"] == registry.full_path("TextData")
    assert config["tower"]["class_path"] == "apps.multimodal.towers.towers.SingleTower"
    assert config["trainer"]["callbacks"] == [{**callback, "class_path": registry.full_path("RoutingDetail")}]
    short = with_short_names(config)
    assert short["data"]["class_path"] == "TextData"
    assert short["trainer"]["callbacks"] == [{**callback, "class_path": "RoutingDetail"}]
    assert with_long_names(short) == config


def test_a_run_has_short_names_and_one_of_before_is_tested_and_goes_on(tmp_path, monkeypatch, moved):
    monkeypatch.chdir(tmp_path)
    config = str(ROOT / "configs/vision/digits.yaml")
    flags = ["--trainer.callbacks+", "RoutingDetail", "--trainer.limit_val_batches", "1", "--data.subset", "200"]
    steps = "--trainer.max_steps"
    assert main(["fit", "--config", config, "--run_dir", "run", steps, "1", *flags]) == 0
    written = yaml.safe_load(Path("run/config.yaml").read_text())
    assert [written[part]["class_path"] for part in ("model", "data")] == ["VisionClassifier", "VisionData"]
    assert [item["class_path"] for item in written["trainer"]["callbacks"]] == ["RoutingDetail"]
    last = Path("run/checkpoints/last.ckpt")
    contents = torch.load(last, weights_only=True)
    assert contents["module_class"] == "VisionClassifier"

    torch.save({**contents, "module_class": earlier("VisionClassifier")}, last)
    Path("run/config.yaml").write_text(yaml.safe_dump(registry.renamed(written, earlier)))
    build("test", ["--ckpt_path", str(last)])
    own = ["--config", "run/config.yaml", "--run_dir", "run"]
    assert main(["fit", *own, "--ckpt_path", "last", steps, "2"]) == 0
    assert torch.load(last, weights_only=True)["global_step"] == 2
    build("fit", [*own, "--weights", str(last), "--run_dir", "next"])


def test_an_export_of_before_is_read(moved):
    told = {"app": "pairs", "module": earlier("ImageTextRetriever"), "preprocessing": {}}
    tower = {"class_path": earlier("apps.multimodal.towers.towers.SingleTower"), "init_args": {}}
    read = Description.from_json(json.dumps({**told, "arguments": {"tower": tower}}), Path("x"))
    assert registry.resolve(read.module).__name__ == "ImageTextRetriever"
    assert read.arguments["tower"]["class_path"] == "apps.multimodal.towers.towers.SingleTower"
