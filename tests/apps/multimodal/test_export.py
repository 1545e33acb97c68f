"""What becomes of a model of images and texts: conversions, and graphs with the documented script."""

from pathlib import Path

import numpy as np
import pytest
import torch
from converted import write_run
from doc_scripts import script
from made_captions import data_of, write_shop
from PIL import Image
from reexported import assert_alike, reexported
from small_pairs import MOE, TOWER
from torch.testing import assert_close
from torch_graphs import output_in_torch

import core
from apps.cli import main
from apps.data.subwords import SubwordConfig, train_subwords
from apps.multimodal.data import ImageTextData
from apps.multimodal.model import AttributeHead
from apps.multimodal.module import ImageTextRetriever
from apps.multimodal.pairs.encoding import PairEncoding, TextEncoding
from apps.multimodal.towers.loss import SigmoidLoss, SoftmaxLoss
from apps.train.checkpoint.loading import load

TOWER_LAYER, HEAD_LAYER = "model.towers.stack.layers.1.ffn", "model.head.experts"
MOE_OVERLAY = "model: {init_args: {moe: {num_experts: 4, router: {class_path: core.TokenChoice}}}}"


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


def test_a_model_is_upcycled_pruned_and_densified_in_its_towers_alone(tmp_path, data):
    (tmp_path / "moe.yaml").write_text(MOE_OVERLAY)
    dense = retriever(data, None)
    sparse = converted(tmp_path, data, dense, "upcycle", "--moe", str(tmp_path / "moe.yaml"), "--batches", "0")
    assert (list(core.moe_layers(sparse)), sparse.moe.num_experts) == ([TOWER_LAYER, HEAD_LAYER], 4)
    batch = next(iter(data.test_dataloader()))
    assert_close(*(module.model(batch.image, batch.text_BL) for module in (sparse, dense)))
    sparse = retriever(data, MOE)
    pruned = converted(tmp_path / "a", data, sparse, "prune", "--keep", "2")
    assert core.moe_layers(pruned)[TOWER_LAYER].num_experts == 2
    dense = converted(tmp_path / "b", data, sparse, "densify", "--how", "average", "--batches", "0")
    assert list(core.moe_layers(dense)) == [HEAD_LAYER]
    for model in (pruned, dense):
        assert_close(model.model.head.state_dict(), sparse.model.head.state_dict(), rtol=0, atol=0)


TEXTS = ["a red circle", "a blue square", "the green star of the sea"]


@pytest.mark.parametrize("loss", [SoftmaxLoss(0.5), SigmoidLoss()])
def test_what_fits_for_a_script_and_for_the_model_is_that_of_the_weights(tmp_path, loss):
    subwords = train_subwords(TEXTS * 4, (), SubwordConfig(vocab_size=300), cache=tmp_path / "cache")
    text = TextEncoding(subwords, max_tokens=8)
    encoding = PairEncoding(8, 3, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), text=text, attributes={"colour": ("red", "blue")})
    head = AttributeHead(core.MMoE(num_experts=2, expert=core.MLP((4,))))
    torch.manual_seed(0)
    model = ImageTextRetriever(
        8, 3, text.vocab_size, 8, {"colour": 2}, TOWER, 8, MOE, loss=loss, attribute_head=head, report=None
    ).eval()
    with torch.no_grad():
        model.loss.log_scale.add_(0.3)  # not as the configuration says
    model.adopt_encoding({"encoding": encoding.state()})

    exported, export = reexported(model, tmp_path)
    assert exported.encoding == encoding
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    (own,), (expected,) = (one.predict([pixels], TEXTS) for one in (exported, model))
    assert own.top == pytest.approx(expected.top, abs=2e-6)
    image = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(exported.model.image_outputs(image)[1], model.model.image_outputs(image)[1])

    Image.fromarray(pixels).save(tmp_path / "image.png")
    code = script("docs/reference/onnx_scripts.md", "match.py")
    printed = output_in_torch(code, export, str(tmp_path), str(tmp_path / "image.png"), *TEXTS)
    assert_alike(printed, [f"{share:.6f} {text}" for text, share in expected.top.items()])
