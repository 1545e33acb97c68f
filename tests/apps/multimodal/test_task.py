"""An image-text model in use: its page has the model's own answers and the experts of its own pass, and requests have
an image, a text, or an image and texts."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import jsonschema_rs
import numpy as np
import pytest
import torch
from PIL import Image
from served import LIMITS
from shown_runs import answered, best_experts, pairs_run, shown

import core
from apps.multimodal.search.search import match
from apps.serve.service.application import body_schema
from apps.serve.service.reading import Reader, Refused
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
        _, logits = model.model.image_outputs(image)
        assert answer == encoding.attributes["colour"][int(logits.argmax())]
    assert best.title.startswith("The best of 200 images for 'a red circle'")
    products = [float(text) for text, _ in best.images]
    assert len(products) == 6
    assert products == sorted(products, reverse=True)


def test_an_image_is_scaled_and_cut_once(made, file):
    model = copy.deepcopy(made[0])
    model.adopt_encoding({"encoding": replace(model.encoding, eval_crop=0.5).state()})
    (matched,) = match(model, [file], READ, 3)
    assert dict(answered(model.task.exhibit(None, 3), file, TEXTS).parts[0].rows) == matched.top


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
    model, _ = made
    alone = model.task.exhibit(None, 3)
    assert alone.examples == ()
    assert alone.about.endswith("took each patch and each subword.")
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


def test_what_a_request_has_together(made):
    service = made[0].task.service()
    (both, image, text) = service.item["examples"]
    assert [list(one) for one in (both, image, text)] == [["image", "texts"], ["image"], ["text"]]
    for wrong in ({}, {"texts": ["a hat"]}, {**image, **text}, {**both, **text}, {**image, "texts": []}, {"text": " "}):
        assert not jsonschema_rs.is_valid(dict(service.item), wrong), wrong
    with pytest.raises(ValueError, match="a text is empty"):
        service.read({**image, "texts": ["a hat", "\x1c"]})  # a space for Python, and none for the schema


@pytest.mark.parametrize(
    "item, complaint",
    [
        ({}, 'inputs[0]: "image" is a required property'),
        ({"texts": ["a hat"]}, 'inputs[0]: "image" is a required property'),
        ({"text": " "}, 'inputs[0].text=" " does not match "\\S"'),
        ({"image": "abcd", "texts": []}, "inputs[0].texts: has less than 1 item"),
        ({"image": "abcd", "hat": 1}, "inputs[0]: Additional properties are not allowed ('hat' was unexpected)"),
    ],
)
def test_a_wrong_request_is_told_what_is_wrong(made, item, complaint):
    service = made[0].task.service()
    reader = Reader(body_schema(service, LIMITS), service.read)
    with pytest.raises(Refused) as refused:
        reader.inputs(json.dumps({"inputs": [item]}).encode())
    assert refused.value.line == complaint


def test_a_request_names_five_texts_and_a_page_all(made, file):
    model, exhibit = made
    texts = [f"a hat of size {n}" for n in range(7)]
    item = {**model.task.item()["examples"][1], "texts": texts}
    (answer,) = model.task.service().predict([model.task.read(item)])
    assert len(answer["top"]) == 5
    assert len(answered(exhibit, file, "\n".join(texts)).parts[0].rows) == 7
