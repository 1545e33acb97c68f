"""A captioner that is converted or leaves the suite: upcycling, ``predict --onnx`` and the documented script."""

import json

import numpy as np
import pytest
import torch
from captioned import COLOURS, SIDE, TEXTS, captioner, images, pairs
from converted import write_run
from doc_scripts import output, script
from PIL import Image
from torch.testing import assert_close
from torch_graphs import folder_of, output_in_torch

import core
from apps.cli import main
from apps.multimodal.captions.task import TASK
from apps.nlp.decode import DecodeConfig
from apps.train.checkpoint.loading import load

CAPTION = script("docs/reference/onnx_scripts.md", "python caption.py")
SEARCH = DecodeConfig("greedy", max_length_ratio=1.0, max_length_extra=0, min_new_tokens=2)


@pytest.fixture
def module():
    module, generator = captioner(decode=SEARCH), torch.Generator().manual_seed(0)
    for weight in module.model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.4, generator=generator)
    return module.eval()


@pytest.fixture
def pictures(tmp_path):
    """Three noisy pictures of a model's size, and one that is scaled and cut."""
    folder, noise = tmp_path / "pictures", np.random.default_rng(0)
    folder.mkdir()
    for number, colour in enumerate(list(COLOURS.values())[:3]):
        pixels = 200 * np.array(colour) + noise.integers(0, 50, (SIDE, SIDE, 3))
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")
    Image.new("RGB", (40, 31), (9, 99, 199)).save(folder / "wide.png")
    return [str(path) for path in sorted(folder.iterdir())]


def test_the_script_writes_what_the_model_does(module, pictures, tmp_path):
    exported = TASK(module).exported()
    folder = str(folder_of(exported, tmp_path))
    captions = [output_in_torch(CAPTION, exported, folder, picture) for picture in pictures]
    assert captions == module.predict(pictures)
    assert len(set(captions)) > 2


@pytest.mark.slow
def test_captions_of_predict_and_of_the_script_are_those_of_the_checkpoint(module, pictures, tmp_path):
    run, exported, file = tmp_path / "run", tmp_path / "exported", tmp_path / "captions.jsonl"
    write_run(run, module, {"class_path": "ImageTextData", "init_args": {"dataset": "shapes"}})
    assert main(["export", "--ckpt_path", str(run), "--output", str(exported)]) == 0
    asked = ["--data.images", str(tmp_path / "pictures"), "--output", str(file)]
    assert main(["predict", "--onnx", str(exported), *asked]) == 0
    written = [json.loads(line)["caption"] for line in file.read_text().splitlines()]
    assert written == module.predict(pictures)
    assert [output(CAPTION, str(exported), picture) for picture in pictures] == written


@pytest.mark.slow
def test_an_upcycled_captioner_begins_as_the_dense_one(tmp_path):
    dense, batch = captioner(moe=None), pairs(*zip(COLOURS, TEXTS, strict=True))
    write_run(tmp_path / "dense", dense, {"class_path": "ImageTextData", "init_args": {}})
    moe = "{num_experts: 4, router: {class_path: core.TokenChoice, init_args: {top_k: 2}}}"
    (tmp_path / "moe.yaml").write_text(f"model: {{init_args: {{moe: {moe}}}}}")
    argv = ["convert", "upcycle", "--ckpt_path", str(tmp_path / "dense"), "--moe", str(tmp_path / "moe.yaml")]
    assert main([*argv, "--output", str(tmp_path / "sparse")]) == 0
    sparse, image = load(tmp_path / "sparse"), images("red", "blue")
    assert list(core.moe_layers(sparse)) == ["model.decoder.layers.1.ffn"]
    assert sparse.moe.expert == core.FFN(16, activation="relu", bias=True)  # as the dense network
    sparse.eval(), dense.eval()
    assert_close(sparse(batch.image, batch.text_BL), dense(batch.image, batch.text_BL))
    assert sparse.hypotheses_of(image, sparse.decode).ids == dense.hypotheses_of(image, dense.decode).ids
