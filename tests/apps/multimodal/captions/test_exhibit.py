"""The page of a captioner has the model's own captions, and the experts of its own pass over image and text."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from made_captions import picture
from shown_runs import answered, best_experts, captioner_run, shown

import core
from apps.data.subwords import BOS_ID
from apps.vision.image_files import scaled


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return shown(captioner_run(tmp_path_factory.mktemp("captioner")))


def test_the_caption_is_the_models_with_the_further_ones_of_the_search(made, tmp_path):
    model, exhibit = made
    picture(1).save(tmp_path / "own.png")
    answer = answered(exhibit, str(tmp_path / "own.png"))
    best, *further = model.candidates([tmp_path / "own.png"], num_return_sequences=3)[0]
    said, table = answer.parts
    assert said.text == (best.text or "(an empty text)")
    assert table.rows == tuple((c.text, f"{c.score:.3f}") for c in further)


def test_patches_and_subwords_have_the_experts_of_their_pass(made, tmp_path):
    model, exhibit = made
    picture(2).save(tmp_path / "own.png")
    answer = answered(exhibit, str(tmp_path / "own.png"))
    assert list(answer.layers) == ["block 1", "decoder 1"]
    image = model.encoding.normalized(scaled([tmp_path / "own.png"], model.encoding.transform), "cpu")
    written = model.hypotheses_of(image, model.decode).best[0]
    with core.record(model.model) as tape:
        model(image, torch.tensor([[BOS_ID, *written]]))
    of_image, of_text = (best_experts(entry.routing) for entry in tape.entries)
    ((patches,), (pieces,)) = answer.layers.values()
    assert patches.experts.reshape(-1, 2).tolist() == of_image[1:]  # after the class token
    assert np.array_equal(patches.image, np.asarray(picture(2)))
    assert pieces.experts.tolist() == of_text


def test_examples_are_validation_images_with_their_texts(made):
    _, exhibit = made
    assert len(exhibit.examples) == 3
    for example in exhibit.examples:
        number = int(example.label.split()[1])
        assert np.array_equal(example.values[0], np.asarray(picture(number)))


def test_a_file_that_is_no_image(made, tmp_path):
    _, exhibit = made
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(ValueError, match=r"text\.png is corrupt"):
        answered(exhibit, str(tmp_path / "text.png"))
