"""A captioner that left the suite: ``predict --onnx`` and the script of docs/reference/onnx_scripts.md."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from captioned import COLOURS, SIDE, captioner
from converted import write_run
from doc_scripts import output, script
from PIL import Image
from torch_graphs import folder_of, output_in_torch

from apps.cli import main
from apps.multimodal.captions.task import TASK
from apps.nlp.decode import DecodeConfig

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
