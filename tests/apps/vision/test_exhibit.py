"""The page of an image classifier has the model's own answer, and the experts of its own pass."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from shown_runs import answered, best_experts, digits_run, shown

import core
from apps.vision.encoding import normalize
from apps.vision.image_files import read_image


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return shown(digits_run(tmp_path_factory.mktemp("digits")))


def test_the_answer_is_the_models_and_the_experts_are_of_its_pass(made, tmp_path):
    model, exhibit = made
    file = str(tmp_path / "own.png")
    Image.fromarray(np.arange(0, 256, 4, dtype=np.uint8).reshape(8, 8)).save(file)
    answer = answered(exhibit, file)
    (predicted,) = model.predict([file])
    assert dict(answer.parts[0].rows) == predicted.top
    pixels = model.encoding.transform(read_image(file))
    with core.record(model.model) as tape:
        model(normalize(pixels[None], model.encoding.mean, model.encoding.std))
    ((patches,),) = answer.layers.values()
    assert list(answer.layers) == ["block 1"]
    assert patches.experts.reshape(4, 2).tolist() == best_experts(tape.entries[0].routing)
    assert np.array_equal(patches.image, pixels[0].numpy())


def test_examples_are_validation_images_of_different_classes(made):
    _, exhibit = made
    assert len({example.label for example in exhibit.examples}) == 3
    assert all(example.values[0].shape == (8, 8) for example in exhibit.examples)


def test_a_file_that_is_no_image(made, tmp_path):
    _, exhibit = made
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(ValueError, match=r"text\.png is corrupt"):
        answered(exhibit, str(tmp_path / "text.png"))
