"""Conversions of a model of images and texts change its towers, and leave the head of attributes as it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from converted import write_run
from made_captions import data_of, write_shop
from small_pairs import MOE, TOWER
from torch.testing import assert_close

import core
from apps.cli import main
from apps.multimodal.data import ImageTextData
from apps.multimodal.model import AttributeHead
from apps.multimodal.module import ImageTextRetriever
from apps.train.checkpoint.loading import load

TOWER_LAYER, HEAD_LAYER = "model.towers.stack.layers.1.ffn", "model.head.experts"
OVERLAY = {"num_experts": 4, "router": {"class_path": "core.TokenChoice", "init_args": {"top_k": 2}}}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> ImageTextData:
    return data_of(write_shop(tmp_path_factory.mktemp("data") / "shop"), attributes=["colour"])


def retriever(data: ImageTextData, moe: core.MoEConfig | None) -> ImageTextRetriever:
    torch.manual_seed(0)
    sizes = {name: getattr(data, name) for name in ("image_size", "in_chans", "vocab_size", "max_tokens", "attributes")}
    module = ImageTextRetriever(**sizes, tower=TOWER, dim=8, moe=moe, attribute_head=AttributeHead())
    module.adopt_encoding({"encoding": data.encoding_state})
    return module.eval()


def converted(tmp_path: Path, data: ImageTextData, module: ImageTextRetriever, *argv: str) -> ImageTextRetriever:
    """Return what ``moesaic convert`` makes of a model without a training."""
    options = {"dataset": "image_captions", "root": data.root, "attributes": ["colour"], "cache_dir": str(tmp_path)}
    write_run(tmp_path / "run", module, {"class_path": "ImageTextData", "init_args": options})
    paths = ["--ckpt_path", str(tmp_path / "run"), "--output", str(tmp_path / "new")]
    assert main(["convert", *argv, *paths]) == 0
    return load(tmp_path / "new").eval()


def outputs(data: ImageTextData, module: ImageTextRetriever):
    batch = next(iter(data.test_dataloader()))
    return module.model(batch.image, batch.text_BL)


def test_an_upcycled_model_begins_as_the_dense_one(tmp_path, data):
    (tmp_path / "moe.yaml").write_text(yaml.safe_dump({"model": {"init_args": {"moe": OVERLAY}}}))
    dense = retriever(data, None)
    sparse = converted(tmp_path, data, dense, "upcycle", "--moe", str(tmp_path / "moe.yaml"), "--batches", "0")
    assert list(core.moe_layers(sparse)) == [TOWER_LAYER, HEAD_LAYER]
    assert sparse.moe.num_experts == 4
    assert_close(outputs(data, sparse), outputs(data, dense))


def test_pruning_and_densifying_take_experts_from_the_towers_alone(tmp_path, data):
    sparse = retriever(data, MOE)
    pruned = converted(tmp_path / "a", data, sparse, "prune", "--keep", "2")
    layers = core.moe_layers(pruned)
    assert layers[TOWER_LAYER].num_experts == 2
    dense = converted(tmp_path / "b", data, sparse, "densify", "--how", "average", "--batches", "0")
    assert list(core.moe_layers(dense)) == [HEAD_LAYER]
    for model in (pruned, dense):
        assert_close(model.model.head.state_dict(), sparse.model.head.state_dict(), rtol=0, atol=0)
