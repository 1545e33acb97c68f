"""An image-text model in use: its page has the model's own answers and the experts of its own pass, and requests have
an image, a text, or an image and texts."""

import copy
import json
from dataclasses import replace

import jsonschema_rs
import numpy as np
import pytest
import torch
from PIL import Image
from refusals import refused
from served import LIMITS
from shown_runs import answered, best_experts, pairs_run, shown

import core
from apps.multimodal.search.search import match
from apps.serve.service.application import body_schema
from apps.serve.service.reading import Reader, Refused
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
    ((colour, answer, _),) = attributes.rows
    with torch.no_grad():
        _, logits = model.model.image_outputs(model.encoding.normalized(read_image(file)[None], "cpu"))
    assert (colour, answer) == ("colour", model.encoding.attributes["colour"][int(logits.argmax())])
    assert best.title.startswith("The best of 200 images for 'a red circle'")
    products = [float(text) for text, _ in best.images]
    assert (len(products), products) == (6, sorted(products, reverse=True))
    # An image is scaled and cut once.
    model = copy.deepcopy(model)
    model.adopt_encoding({"encoding": replace(model.encoding, eval_crop=0.5).state()})
    (matched,) = match(model, [file], READ, 3)
    assert dict(answered(model.task.exhibit(None, 3), file, TEXTS).parts[0].rows) == matched.top


def test_the_experts_are_of_one_pass(made, file):
    model, exhibit = made
    answer = answered(exhibit, file, TEXTS)
    ((patches, first, *others),) = answer.layers.values()
    assert (list(answer.layers), len(others)) == (["block 1"], 2)
    encoding = model.encoding
    with torch.no_grad(), core.record(model) as tape:
        model.image_vectors(encoding.normalized(read_image(file)[None], "cpu"))
        model.text_vectors(encoding.text.encode(READ[:1]))
    of_image, of_text = tape.entries
    assert patches.experts.reshape(64, 2).tolist() == best_experts(of_image.routing)
    assert (first.title, first.experts.tolist()) == ("a red circle", best_experts(of_text.routing))
    assert sum(map(len, first.words)) == len(encoding.text.ids("a red circle"))
    assert np.array_equal(patches.image, read_image(file).permute(1, 2, 0).numpy())


def test_a_text_alone_searches_and_examples_are_pairs_of_the_validation(made):
    _, exhibit = made
    answer = answered(exhibit, None, "a red circle")
    (best,), ((pieces,),) = answer.parts, answer.layers.values()
    assert (len(best.images), best.images[0][1].shape, pieces.title) == (6, (32, 32, 3), "a red circle")
    assert len({example.label for example in exhibit.examples}) == 3
    for example in exhibit.examples:
        lines = example.values[1].splitlines()
        assert (len(lines), lines[0]) == (3, example.label)


def test_without_data_there_must_be_an_image_and_what_cannot_be_read_is_refused(made, file, tmp_path):
    model, exhibit = made
    alone = model.task.exhibit(None, 3)
    assert alone.examples == ()
    assert alone.about.endswith("took each patch and each subword.")
    assert len(answered(alone, file, TEXTS).parts) == 2
    refused("Image: there is none yet", answered, alone, None, TEXTS)
    refused("Texts, one a line is empty", answered, exhibit, file, " \n ")
    many = "\n".join(f"text {i}" for i in range(21))
    refused("Texts: 21 are too many, at most 20 are read", answered, exhibit, file, many)
    (tmp_path / "text.png").write_text("no image")
    refused(r"text\.png is corrupt", answered, exhibit, str(tmp_path / "text.png"), "a text")


def test_what_a_request_has_together_and_five_texts_are_named(made, file):
    service = made[0].task.service()
    (both, image, text) = service.item["examples"]
    assert [list(one) for one in (both, image, text)] == [["image", "texts"], ["image"], ["text"]]
    for wrong in ({}, {"texts": ["a hat"]}, {**image, **text}, {**both, **text}, {**image, "texts": []}, {"text": " "}):
        assert not jsonschema_rs.is_valid(dict(service.item), wrong), wrong
    with pytest.raises(ValueError, match="a text is empty"):
        service.read({**image, "texts": ["a hat", "\x1c"]})  # a space for Python, and none for the schema
    model, exhibit = made
    texts = [f"a hat of size {n}" for n in range(7)]
    item = {**model.task.item()["examples"][1], "texts": texts}
    (answer,) = model.task.service().predict([model.task.read(item)])
    assert (len(answer["top"]), len(answered(exhibit, file, "\n".join(texts)).parts[0].rows)) == (5, 7)


@pytest.mark.parametrize("item, complaint", [
    ({}, 'inputs[0]: "image" is a required property'),
    ({"texts": ["a hat"]}, 'inputs[0]: "image" is a required property'),
    ({"text": " "}, 'inputs[0].text=" " does not match "\\S"'),
    ({"image": "abcd", "texts": []}, "inputs[0].texts: has less than 1 item"),
    ({"image": "abcd", "hat": 1}, "inputs[0]: Additional properties are not allowed ('hat' was unexpected)"),
])  # fmt: skip
def test_a_wrong_request_is_told_what_is_wrong(made, item, complaint):
    service = made[0].task.service()
    reader = Reader(body_schema(service, LIMITS), service.read)
    with pytest.raises(Refused) as refused:
        reader.inputs(json.dumps({"inputs": [item]}).encode())
    assert refused.value.line == complaint
