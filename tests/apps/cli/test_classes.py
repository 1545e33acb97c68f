"""The words of a command line: short names of public classes, and nulls at any depth."""

from __future__ import annotations

from pathlib import Path

import compared
import pytest

from apps import registry
from apps.cli.classes import app_classes, load_class, long_name, with_long_names
from apps.cli.errors import UsageError
from apps.cli.flags import with_classes, with_flags
from apps.cli.request import Request
from apps.cli.sections import Sections
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
        assert with_classes({}, flags) == with_classes({}, ["=".join(flags)]) == {part: name}
    assert with_classes({}, [f"--{part}.init_args.text", name]) == {}


@pytest.mark.parametrize("name", ["ExpertAveraging", "RoutingDetail", "RoutingDoctor"])
def test_a_callback_of_the_trainer_is_named_shortly_in_yaml_and_by_flags(config, name):
    Path("by_name.yaml").write_text(f"trainer: {{callbacks: [{name}, LearningRateMonitor]}}")
    Path("by_path.yaml").write_text(f"trainer: {{callbacks: {{class_path: {registry.full_path(name)}}}}}")
    for words in (
        ["--config", "by_name.yaml"],
        ["--config", "by_path.yaml", "--trainer.callbacks+=LearningRateMonitor"],
        [f"--trainer.callbacks=[{name}]", "--trainer.callbacks+", "LearningRateMonitor"],
    ):
        own = Sections(Request.read("fit", ["--config", config, *words]).config).plain()["trainer"]["callbacks"]
        assert [part["class_path"] for part in own] == [
            registry.full_path(name),
            "lightning.pytorch.callbacks.LearningRateMonitor",
        ]


def test_a_strategy_of_ours_is_no_text(config):
    """A strategy may be a text, such as ddp."""
    for flag in ("--trainer.strategy", "--trainer.strategy.class_path"):
        own = Sections(Request.read("fit", ["--config", config, flag, "ExpertParallelStrategy"]).config).plain()
        assert own["trainer"]["strategy"]["class_path"] == "apps.train.sharded.expert_parallel.ExpertParallelStrategy"
    own = Sections(Request.read("fit", ["--config", config, "--trainer.strategy", "ddp"]).config).plain()
    assert own["trainer"]["strategy"] == "ddp"


def test_a_request_has_class_paths(tmp_path):
    (tmp_path / "short.yaml").write_text(
        "model: {class_path: LanguageModeler, init_args: {moe: null}}\ndata: TextData\n"
    )
    config = Request.read("fit", ["--config", str(tmp_path / "short.yaml")]).config
    assert config["model"]["class_path"] == "apps.nlp.language.module.LanguageModeler"
    assert config["data"] == "apps.nlp.language.data.TextData"


def test_a_class_is_loaded_or_is_none():
    assert load_class("apps.vision.data.VisionData").__name__ == "VisionData"
    for path in ("nowhere.Model", "apps.vision.data.Nothing", "apps.vision.gone.VisionData", "Model", "", None):
        assert load_class(path) is None


def test_null_reaches_any_depth(config, tmp_path):
    written = {"model": {"class_path": "V", "init_args": {"moe": {"capacity_factor": 1.0, "router": "TokenChoice"}}}}
    moe = {"capacity_factor": None, "router": "TokenChoice"}
    for name in ("model", "model.init_args"):
        deep = with_flags(written, [f"--{name}.moe.capacity_factor=~", "--print_config"])
        assert deep["model"]["init_args"]["moe"] == moe
    assert with_flags(written, ["--model.moe", "null"])["model"]["init_args"]["moe"] is None
    line = r"model\.mo does not exist; did you mean 'moe'\?"
    with pytest.raises(UsageError, match=line):  # where there is nothing to set it in
        build("fit", ["--config", config, "--model.mo.capacity_factor=null"])
    flags = ["--model.moe.capacity_factor", "1.5", "--model.moe.eval_capacity_factor", "null"]
    moe = build("fit", ["--config", config, *flags]).model.hparams["moe"]
    assert (moe["capacity_factor"], moe["eval_capacity_factor"]) == (1.5, None)
    (tmp_path / "no_router.yaml").write_text(compared.CONFIG)
    flags = ["--model.moe.router", "core.TokenChoice", "--model.moe.router.noise", "null"]
    model = build("fit", ["--config", str(tmp_path / "no_router.yaml"), *flags]).model
    assert model.hparams["moe"]["router"]["init_args"]["noise"] is None
