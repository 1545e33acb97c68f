"""The words of a command line: short names of public classes, and nulls at any depth."""

from __future__ import annotations

import compared
import pytest

from apps import registry
from apps.cli.classes import app_classes, load_class, long_name, with_long_names
from apps.cli.flags import with_classes_and_nulls
from apps.cli.request import Request
from apps.cli.train import build


def test_the_apps_classes_need_no_import():
    assert set(app_classes("model")) == {
        "HubCausalLM", "ImageCaptioner", "ImageGenerator", "ImageTextRetriever", "LanguageModeler",
        "MultiTaskRecommender", "NextItemRecommender", "TextToText", "Translator", "TwoTowerRetriever",
        "VisionClassifier",
    }  # fmt: skip
    assert set(app_classes("data")) == {
        "GenerationData", "HistoryData", "HubTextData", "ImageTextData", "RetrievalData", "TableData", "TextData",
        "TextToTextData", "TranslationData", "VisionData",
    }  # fmt: skip
    assert long_name("data", "TextData") == "apps.nlp.language.data.TextData"
    assert long_name("data", "mine.TextData") == "mine.TextData"


@pytest.mark.parametrize(
    "part, name", [*(("model", n) for n in registry.MODELS), *(("data", n) for n in registry.DATA)]
)
def test_every_model_and_data_is_named_shortly_in_yaml_and_by_flags(part, name):
    path = registry.full_path(name)
    assert with_long_names({part: name, "n": 1}) == {part: path, "n": 1}
    assert with_long_names({part: {"class_path": name}}) == {part: {"class_path": path}}
    for flags in ([f"--{part}", name], [f"--{part}.class_path", name]):
        assert with_classes_and_nulls({}, flags) == with_classes_and_nulls({}, ["=".join(flags)]) == ({part: name}, [])
    text = [f"--{part}.init_args.text", name]
    assert with_classes_and_nulls({}, text) == ({}, text)


@pytest.mark.parametrize("name", registry.TRAINER)
def test_every_part_of_the_trainer_is_named_shortly_in_yaml_and_by_flags(name):
    path = registry.full_path(name)
    named = {"class_path": path, "init_args": {"a": 1}}
    for part in ("strategy", "plugins"):
        assert with_long_names({"trainer": {part: name}}) == {"trainer": {part: {"class_path": path}}}
        written = {"trainer": {part: {"class_path": name, "init_args": {"a": 1}}}}
        assert with_long_names(written) == {"trainer": {part: named}}
    assert with_long_names({"trainer": {"callbacks": [name, "x"]}}) == {
        "trainer": {"callbacks": [{"class_path": path}, "x"]}
    }
    for flags in (["--trainer.strategy", name], [f"--trainer.strategy.class_path={name}"]):
        assert with_classes_and_nulls({}, flags) == ({"trainer": {"strategy": name}}, [])


def test_a_request_has_class_paths(tmp_path):
    (tmp_path / "short.yaml").write_text(
        "model: {class_path: LanguageModeler, init_args: {moe: null}}\ndata: TextData\n"
        "trainer: {strategy: {class_path: TorchRecStrategy}}"
    )
    config = Request.read("fit", ["--config", str(tmp_path / "short.yaml")]).config
    assert config["model"]["class_path"] == "apps.nlp.language.module.LanguageModeler"
    assert config["data"] == "apps.nlp.language.data.TextData"
    assert config["trainer"]["strategy"]["class_path"] == "apps.recsys.tables.shard.strategy.TorchRecStrategy"


def test_a_class_is_loaded_or_is_none():
    assert load_class("apps.vision.data.VisionData").__name__ == "VisionData"
    for path in ("nowhere.Model", "apps.vision.data.Nothing", "apps.vision.gone.VisionData", "Model", "", None):
        assert load_class(path) is None


def test_null_reaches_any_depth(config, tmp_path):
    written = {"model": {"class_path": "V", "init_args": {"moe": {"capacity_factor": 1.0, "router": "TokenChoice"}}}}
    argv = ["--trainer.logger", "false", "--model.moe.capacity_factor", "null", "--model.moe=null", "--print_config"]
    merged, rest = with_classes_and_nulls(written, argv)
    assert merged["model"]["init_args"]["moe"] == {"capacity_factor": None, "router": "TokenChoice"}
    assert rest == ["--trainer.logger", "false", "--model.moe=null", "--print_config"]
    # Where there is nothing to set it in, the flag stays, to be refused by name.
    for flag in ("--model.mo.capacity_factor=null", "--model.init_args.moe.router.mood=~"):
        assert with_classes_and_nulls(written, [flag]) == (written, [flag])
    deep = with_classes_and_nulls(written, ["--model.init_args.moe.capacity_factor=~"])
    assert deep == (merged, [])
    flags = ["--model.moe.capacity_factor", "1.5", "--model.moe.eval_capacity_factor", "null"]
    moe = build("fit", ["--config", config, *flags]).model.hparams["moe"]
    assert (moe["capacity_factor"], moe["eval_capacity_factor"]) == (1.5, None)
    (tmp_path / "no_router.yaml").write_text(compared.CONFIG)
    flags = ["--model.moe.router", "core.TokenChoice", "--model.moe.router.noise", "null"]
    model = build("fit", ["--config", str(tmp_path / "no_router.yaml"), *flags]).model
    assert model.hparams["moe"]["router"]["init_args"]["noise"] is None
