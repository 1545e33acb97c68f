"""A model of images and texts that runs its graphs, and the documented script."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from doc_scripts import script
from PIL import Image
from reexported import assert_alike, reexported
from small_pairs import MOE, TOWER
from torch_graphs import output_in_torch

import core
from apps.data.subwords import SubwordConfig, train_subwords
from apps.multimodal.encoding import PairEncoding, TextEncoding
from apps.multimodal.loss import SigmoidLoss, SoftmaxLoss
from apps.multimodal.model import AttributeHead
from apps.multimodal.module import ImageTextRetriever

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
