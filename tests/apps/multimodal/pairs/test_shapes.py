"""The synthetic shapes: what their sentences and labels say is in the picture."""

from __future__ import annotations

import pytest
import torch

from apps.multimodal.pairs.shapes import ATTRIBUTES, COLOURS, PLACES, SIZES, read_shapes

PAIRS = read_shapes()


def test_every_sentence_names_every_label_and_no_two_images_have_the_same():
    rows = list(zip(*PAIRS.labels.values(), strict=True))
    assert len(rows) == len(set(rows)) == len(PAIRS.texts) == 2500
    for text, row in zip(PAIRS.texts, rows, strict=True):
        words = text.replace(",", "").replace(":", "").split()
        assert set(row) <= set(words), text
    assert {split: PAIRS.split.count(split) for split in SIZES} == SIZES


def test_every_class_is_in_every_split():
    for split in SIZES:
        for name, classes in ATTRIBUTES.items():
            labels = {v for v, own in zip(PAIRS.labels[name], PAIRS.split, strict=True) if own == split}
            assert labels == set(classes)


def test_the_colour_and_the_place_are_in_the_picture():
    pixels = PAIRS.images.pixels.float()
    for n in range(0, 2500, 25):
        if PAIRS.labels["texture"][n] != "plain" or PAIRS.labels["shape"][n] == "ring":
            continue
        paint = torch.tensor(COLOURS[PAIRS.labels["colour"][n]])[:, None, None]
        is_paint = (pixels[n] - paint).abs().amax(0) < 30
        rows, columns = is_paint.nonzero().float().mean(0)
        x, y = PLACES[PAIRS.labels["place"][n]]
        # the center of gravity lies near the place: 15.5 is the middle
        assert max(abs(columns - 15.5 - x), abs(rows - 15.5 - y)) < 3.5, n


def test_a_seed_gives_the_same_images_and_some_attributes_are_chosen():
    again = read_shapes(["shape"])
    assert torch.equal(again.images.pixels, PAIRS.images.pixels)
    assert again.texts == PAIRS.texts
    assert again.labels == {"shape": PAIRS.labels["shape"]}
    with pytest.raises(ValueError, match=r"attributes='shap' is not one of .*; did you mean 'shape'"):
        read_shapes(["shap"])
