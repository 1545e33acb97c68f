"""The page of an image-text model has the model's own answers, and the experts of its own pass."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from shown_runs import answered, best_experts, pairs_run, shown

import core
from apps.multimodal.search import match
from apps.vision.encoding import normalize
from apps.vision.image_files import read_image

TEXTS = "a red circle\n  a large   blue\nstar \n\na red circle\n"
READ = ["a red circle", "a large blue", "star"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return shown(pairs_run(tmp_path_factory.mktemp("pairs")))


@pytest.fixture
def file(made, tmp_path) -> str:
    _, exhibit = made
    Image.fromarray(exhibit.examples[0].values[0]).save(tmp_path / "own.png")
    return str(tmp_path / "own.png")


def test_the_answer_is_the_models(made, file):
    model, exhibit = made
    bars, attributes, best = answered(exhibit, file, TEXTS).parts
    (matched,) = match(model, [file], READ, 3)
    assert dict(bars.rows) == matched.top
    assert set(matched.top) == set(READ)  # each line once, without spaces around it
    with torch.no_grad():
        encoding = model.encoding
        image = normalize(read_image(file)[None], encoding.mean, encoding.std)
        ((colour, answer, _),) = attributes.rows
        assert colour == "colour"
        (logits,) = model.model.attribute_logits(image)
        assert answer == encoding.attributes["colour"][int(logits.argmax())]
    assert best.title.startswith("The best of 200 images for 'a red circle'")
    products = [float(text) for text, _ in best.images]
    assert len(products) == 6
    assert products == sorted(products, reverse=True)


def test_the_experts_are_of_one_pass(made, file):
    model, exhibit = made
    answer = answered(exhibit, file, TEXTS)
    ((patches, first, *others),) = answer.layers.values()
    assert list(answer.layers) == ["block 1"]
    assert len(others) == 2
    encoding = model.encoding
    image = normalize(read_image(file)[None], encoding.mean, encoding.std)
    with torch.no_grad(), core.record(model) as tape:
        model.image_vectors(image)
        model.text_vectors(encoding.text.encode(READ[:1]))
    of_image, of_text = tape.entries
    assert patches.experts.reshape(64, 2).tolist() == best_experts(of_image.routing)
    assert first.experts.tolist() == best_experts(of_text.routing)
    assert first.title == "a red circle"
    assert sum(map(len, first.words)) == len(encoding.text.ids("a red circle"))
    assert np.array_equal(patches.image, read_image(file).permute(1, 2, 0).numpy())


def test_a_text_alone_searches(made):
    _, exhibit = made
    answer = answered(exhibit, None, "a red circle")
    (best,) = answer.parts
    assert len(best.images) == 6
    assert best.images[0][1].shape == (32, 32, 3)
    ((pieces,),) = answer.layers.values()
    assert pieces.title == "a red circle"


def test_examples_are_pairs_of_the_validation(made):
    _, exhibit = made
    assert len({example.label for example in exhibit.examples}) == 3
    for example in exhibit.examples:
        lines = example.values[1].splitlines()
        assert lines[0] == example.label
        assert len(lines) == 3


def test_without_data_there_must_be_an_image(made, file):
    from apps.multimodal.exhibit import exhibit as make

    model, _ = made
    alone = make(model, None, 3)
    assert alone.examples == ()
    assert len(answered(alone, file, TEXTS).parts) == 2
    with pytest.raises(ValueError, match="Image: there is none yet"):
        answered(alone, None, TEXTS)


def test_what_is_refused(made, file, tmp_path):
    _, exhibit = made
    with pytest.raises(ValueError, match="Texts, one a line is empty"):
        answered(exhibit, file, " \n ")
    with pytest.raises(ValueError, match="Texts: 21 are too many, at most 20 are read"):
        answered(exhibit, file, "\n".join(f"text {i}" for i in range(21)))
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(ValueError, match=r"text\.png is corrupt"):
        answered(exhibit, str(tmp_path / "text.png"), "a text")
