"""A module of a script takes what it was not given from its trainer's data."""

from __future__ import annotations

import copy

import pytest
import torch
from copying import TRANSFORMER, copy_data
from lightning.pytorch import LightningDataModule, Trainer
from made_table import features
from tiny_app import TinyData

import apps
from apps.multimodal.captions.module import ImageCaptioner
from apps.multimodal.module import ImageTextRetriever
from apps.nlp.language.module import LanguageModeler
from apps.nlp.translation.module import Translator
from apps.recsys.retrieval.module import TwoTowerRetriever
from apps.recsys.sequence.module import NextItemRecommender
from apps.recsys.tables.module import MultiTaskRecommender
from apps.vision.data import VisionData
from apps.vision.model import ViTConfig
from apps.vision.module import VisionClassifier

VIT = ViTConfig(variant="nano", patch_size=2, embed_dim=16, depth=2, num_heads=2)
PAIRS = {"image_size": 16, "in_chans": 3, "vocab_size": 50, "max_tokens": 8}


def trainer(folder) -> Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    return Trainer(max_steps=2, limit_val_batches=1, accelerator="cpu", logger=False, default_root_dir=folder, **quiet)


def test_an_images_model_is_built_for_the_data_trained_saved_and_tested(tmp_path):
    torch.manual_seed(0)
    model, run = VisionClassifier(vit=VIT, report=None), trainer(tmp_path)
    run.fit(model, VisionData("digits"))
    assert (model.image_size, model.in_chans, model.num_classes) == (8, 1, 10)
    run.save_checkpoint(tmp_path / "a.ckpt")
    loaded = apps.load(tmp_path / "a.ckpt")
    assert loaded.image_size == 8
    assert all(torch.equal(v, loaded.state_dict()[k]) for k, v in model.state_dict().items())
    weight = model.model.head.weight
    trainer(tmp_path).test(model, VisionData("digits"), verbose=False)
    assert model.model.head.weight is weight  # a trained model stays
    tested = VisionClassifier(vit=VIT, report=None)
    trainer(tmp_path).test(tested, VisionData("digits"), ckpt_path=tmp_path / "a.ckpt", verbose=False)
    assert torch.equal(tested.model.head.weight, weight)
    with pytest.raises(ValueError, match="image_size=28 does not fit the data, whose image_size is 8"):
        trainer(tmp_path).fit(VisionClassifier(vit=VIT, image_size=28, report=None), VisionData("digits"))


class Known(LightningDataModule):
    """What a model asks of its data."""

    def __init__(self, **facts: object) -> None:
        super().__init__()
        vars(self).update(facts)


@pytest.mark.parametrize(
    ("model", "facts"),
    [
        (ImageTextRetriever, PAIRS),
        (ImageCaptioner, PAIRS),
        (MultiTaskRecommender, {"features": features()}),
        (NextItemRecommender, {"num_items": 9, "max_length": 5}),
        (TwoTowerRetriever, {"user_features": features(), "item_features": features(), "num_items": 200}),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
def test_a_model_waits_for_what_the_data_know(model, facts):
    made = copy.deepcopy(model())
    made.trainer = Trainer(logger=False)
    made.trainer.datamodule = Known(**facts)
    made.configure_callbacks()
    assert {name: getattr(made, name) for name in facts} == facts
    assert {name: made.hparams[name] for name in facts if isinstance(facts[name], int)} == {
        name: value for name, value in facts.items() if isinstance(value, int)
    }
    assert list(made.parameters())
    assert made.trainer.datamodule is not None


@pytest.mark.parametrize("kind", [Translator, LanguageModeler])
def test_a_text_model_takes_its_subwords_and_starts_a_training(kind, tmp_path):
    data, model = copy_data(tmp_path), kind(transformer=TRANSFORMER, report=None)
    made = trainer(tmp_path)
    model.trainer, made.datamodule = made, data
    model.configure_callbacks()
    assert model.subwords == data.subwords
    assert getattr(model, "pairs", ("en-de",)) == ("en-de",)
    assert model.hparams["subwords"] is not None
    model.setup("fit")


@pytest.mark.parametrize(
    "model", [MultiTaskRecommender, NextItemRecommender, TwoTowerRetriever, Translator, LanguageModeler]
)
def test_without_data_one_line_says_what_is_lacking(model, tmp_path):
    with pytest.raises(ValueError, match=rf"{model.__name__} lacks \w+.*, which the data know: give"):
        model()(torch.zeros(1, 1, dtype=torch.int64))
    with pytest.raises(ValueError, match=rf"{model.__name__} lacks "):
        trainer(tmp_path).fit(model(), TinyData())
