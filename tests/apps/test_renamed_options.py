"""Options and classes of files by their old names: of checkpoints, configurations and exports."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from places import ROOT
from shown_runs import RUNS

import apps
import core
from apps import registry
from apps.cli import main
from apps.cli.classes import with_long_names, with_short_names
from apps.cli.configs import read_config
from apps.cli.train import build
from apps.demonstrate.command import data_of
from apps.train.publish.exported import Description
from apps.train.sharded.expert_parallel import ExpertParallelStrategy


def test_a_configuration_is_read_with_new_names(tmp_path: Path):
    strategy = {"class_path": "ExpertParallelStrategy", "init_args": {"shards": 2, "nodes": 1}}
    (tmp_path / "old.yaml").write_text(yaml.safe_dump({"trainer": {"strategy": strategy}, "model": {"experts": 1}}))
    config = read_config(tmp_path / "old.yaml")
    assert config["trainer"]["strategy"]["init_args"] == {"fsdp_size": 2, "nodes": 1}
    assert config["model"] == {"experts": 1}  # the same name in another section stays


def test_options_and_classes_of_files_of_before():
    plain = {"load_balancing": 0.5, "router_z": 0.1}
    old = {"moe": {"balance": plain, "router": {"class_path": "core.TokenChoice", "init_args": {"second": "random"}}}}
    new = {"load_balancing_loss": 0.5, "router_z_loss": 0.1}
    router = {"class_path": "core.TokenChoice", "init_args": {"second_expert_policy": "random"}}
    assert registry.of_today({**old, "mixing_balance": plain}, "model") == {
        "moe": {"balance": new, "router": router},
        "mixing_balance": new,
    }
    assert registry.of_today({"expert": {"class_path": "core.Copy"}}) == {"expert": {"class_path": "core.Identity"}}


@pytest.mark.parametrize(
    "make",
    [
        lambda: core.Balance(load_balancing=0.5),
        lambda: core.TokenChoice(2, second="random"),
        lambda: ExpertParallelStrategy(experts=2),
    ],
)
def test_python_takes_names_of_today_only(make):
    with pytest.raises(TypeError, match=r"unexpected keyword argument '(load_balancing|second|experts)'"):
        make()


def aged(value, section=""):
    """Return plain values with the old names of options."""
    if not isinstance(value, dict):
        return value
    sections = [names for end, names in registry.RENAMED.items() if f".{section}".endswith(f".{end}")]
    old = {new: name for names in sections for name, new in names.items()}
    return {old.get(k, k): aged(v, section if k == "init_args" else f"{section}.{k}") for k, v in value.items()}


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
def test_a_checkpoint_names_its_class_shortly_and_one_of_before_loads(name, tmp_path, moved):
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
    # The names of options may be the old ones.
    arguments = aged({**contents["hyper_parameters"], "optimizer": {"warmup_steps": 3}}, "model")
    assert arguments["optimizer"] == {"warmup": 3}
    torch.save({**contents, "hyper_parameters": arguments}, file)
    assert apps.load(file).hparams["optimizer"]["warmup_steps"] == 3


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
    assert with_long_names({**short, "trainer": config["trainer"]}) == config


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
