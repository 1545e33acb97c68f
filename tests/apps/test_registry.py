"""The public classes by their short names."""

from __future__ import annotations

import importlib

import pytest

from apps import registry
from apps.train.step.module import SparseModule
from core.registry import OpenConfig, is_registered

NAMES = [*registry.MODELS, *registry.DATA, *registry.TRAINER]

IN_FILES = (
    "apps.hub.data.HubTextData",
    "apps.hub.module.HubCausalLM",
    "apps.multimodal.captions.module.ImageCaptioner",
    "apps.multimodal.data.ImageTextData",
    "apps.multimodal.drawn.PatchImages",
    "apps.multimodal.drawn.PieceTexts",
    "apps.multimodal.loss.SigmoidLoss",
    "apps.multimodal.loss.SoftmaxLoss",
    "apps.multimodal.module.ImageTextRetriever",
    "apps.multimodal.pretrained.BertTexts",
    "apps.multimodal.pretrained.ClipImages",
    "apps.multimodal.pretrained.ClipTexts",
    "apps.multimodal.pretrained.ViTImages",
    "apps.multimodal.towers.SingleTower",
    "apps.multimodal.two_towers.TwoTowers",
    "apps.nlp.language.data.TextData",
    "apps.nlp.language.module.LanguageModeler",
    "apps.nlp.text_to_text.data.TextToTextData",
    "apps.nlp.text_to_text.module.TextToText",
    "apps.nlp.translation.data.TranslationData",
    "apps.nlp.translation.module.Translator",
    "apps.plan.inputs.Vocabulary",
    "apps.recsys.retrieval.data.RetrievalData",
    "apps.recsys.retrieval.module.TwoTowerRetriever",
    "apps.recsys.sequence.data.HistoryData",
    "apps.recsys.sequence.module.NextItemRecommender",
    "apps.recsys.tables.bottoms.SharedBottom",
    "apps.recsys.tables.bottoms.SingleTask",
    "apps.recsys.tables.data.TableData",
    "apps.recsys.tables.module.MultiTaskRecommender",
    "apps.recsys.tables.strategy.TorchRecStrategy",
    "apps.report.live.RoutingDetail",
    "apps.train.checkpoints.BestAndLast",
    "apps.train.doctor.RoutingDoctor",
    "apps.train.expert_parallel.ExpertParallelStrategy",
    "apps.train.schedules.ExpertAveraging",
    "apps.train.schedules.GrowingTopK",
    "apps.train.schedules.SharedStart",
    "apps.vision.data.VisionData",
    "apps.vision.generation.data.GenerationData",
    "apps.vision.generation.module.ImageGenerator",
    "apps.vision.module.VisionClassifier",
)
"""Class paths that checkpoints and configurations may hold. A line stays when its class moves."""


@pytest.mark.parametrize("name", NAMES)
def test_a_short_name_and_the_class_path_mean_one_class(name):
    kind = registry.resolve(name)
    path = registry.class_path(kind)
    assert path == registry.full_path(name) == registry.full_path(path)
    assert registry.full_path(f"apps.gone.{name}") is None
    assert registry.name_of(kind) == registry.name_of(path) == name
    assert registry.name_of(f"apps.gone.{name}") == f"apps.gone.{name}"


def test_a_name_stands_for_one_class():
    assert len(NAMES) == len(set(NAMES))
    with pytest.raises(KeyError, match="Nobody"):
        registry.resolve("Nobody")


def test_every_path_that_a_file_may_hold_is_a_class_of_today():
    for name in NAMES:
        registry.resolve(name)
    for path in IN_FILES:
        module, _, name = (registry.full_path(path) or registry.today(path)).rpartition(".")
        kind = getattr(importlib.import_module(module), name)
        assert name == path.rpartition(".")[2]
        assert registry.full_path(path) is not None or is_registered(kind)
    leaves = [registry.class_path(kind) for kind in registry.subclasses(OpenConfig) if not kind.__subclasses__()]
    now = {*map(registry.full_path, NAMES), *(path for path in leaves if path.startswith("apps."))}
    assert now <= {registry.today(path) for path in IN_FILES}
    assert {*registry.FORMER} - {*IN_FILES} == {"core.Copy"}  # the one whose name changed, core.Identity


def test_every_module_of_the_apps_is_in_the_registry():
    for name in registry.MODELS:
        registry.resolve(name)
    own = [kind.__name__ for kind in registry.subclasses(SparseModule) if kind.__module__.startswith("apps.")]
    public = {name for name in own if not name.startswith("_")}
    bases = {"SparseModule", "TextModule", "WritingModule", "JudgedModule", "PairModule"}
    assert public - bases == set(registry.MODELS)
