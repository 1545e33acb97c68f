"""Splits that share neither an image nor a caption, and the pairs that are drawn."""

import numpy as np
import pytest
import torch
from refusals import refused

from apps.data.splits import hold_out
from apps.multimodal.pairs.shapes import ATTRIBUTES, COLOURS, PLACES, SIZES, read_shapes
from apps.multimodal.pairs.splits import groups_of, num_trained, split_images


def test_images_of_one_caption_or_file_are_in_one_split_and_given_splits_stay(tmp_path):
    # 0 and 1 share "a"; 1 and 2 share "B c", in other letters and spaces; 3 stands alone
    group_I = groups_of(np.array([0, 1, 1, 2, 3]), ["a", "a", "B  c", "b C", "d"], 4)
    assert group_I[0] == group_I[1] == group_I[2] != group_I[3]
    (tmp_path / "0.png").touch()
    (tmp_path / "1.png").symlink_to(tmp_path / "0.png")
    files, texts = [tmp_path / f"{i % 2}.png" for i in range(6)], [f"title {i}" for i in range(14)]
    files += [tmp_path / f"other {i}.png" for i in range(8)]
    for seed in range(5):
        splits = split_images([None] * 14, np.arange(14), texts, {"test": 3, "val": 0}, seed, files)
        assert len(set(splits[:6])) == 1
    # image 2 has no caption; what the files do not give is held out of their training images
    splits = split_images(["train", "test", "train", "train"], np.array([0, 1, 3]), ["a", "a", "b"], {
        "test": None, "val": 1,
    }, seed=0)  # fmt: skip
    assert (splits[1], splits[2], sorted(splits[[0, 3]].tolist())) == ("test", "", ["train", "val"])
    assert num_trained(["a", "A "], np.array(["train", "test"]), "test") == 1


def test_a_group_goes_into_one_set_and_no_caption_is_in_two_splits():
    group_I = np.array([0, 0, 0, 1, 1, 2, 3, 4, 5, 6])
    for seed in range(20):
        first, second = hold_out(group_I, [2, 3], seed)
        assert len(first) == 2
        assert len(second) <= 3
        assert not set(group_I[first]) & set(group_I[second])
        for chosen in (first, second):  # whole groups
            assert set(np.flatnonzero(np.isin(group_I, group_I[chosen])).tolist()) == set(chosen.tolist())
        assert [x.tolist() for x in hold_out(group_I, [2, 3], seed)] == [first.tolist(), second.tolist()]
    image_N = np.repeat(np.arange(500), 2)
    texts = [f"title {n % 190}" if n % 2 else f"own {n}" for n in range(1000)]
    splits = split_images([None] * 500, image_N, texts, {"test": 0.1, "val": 0.1}, seed=3)
    sizes = {split: int((splits == split).sum()) for split in ("train", "val", "test")}
    assert sum(sizes.values()) == 500
    assert 45 <= sizes["val"] <= 50  # titles have 5 or 6 images each: fewer than 6 places stay free
    assert 45 <= sizes["test"] <= 50
    own = {split: {t for t, s in zip(texts, splits[image_N], strict=True) if s == split} for split in set(splits)}
    assert not own["train"] & own["test"] | own["train"] & own["val"] | own["val"] & own["test"]
    assert num_trained(texts, splits[image_N], "test") == 0
    assert (splits != split_images([None] * 500, image_N, texts, {"test": 0.1, "val": 0.1}, seed=4)).any()


@pytest.mark.parametrize("split_I, texts, sizes, message", [
    (["test", "train"], ["a", "b"], {"test": 1, "val": 0}, "test_size=1: the files have test images of their own"),
    ([None] * 3, ["a", "b", "c"], {"test": 2, "val": 1}, "test_size=2 and val_size=1 leave none of the 3 images"),
    ([None] * 4, ["a"] * 4, {"test": 1, "val": 1}, "none fit into test, .* in common stay together, and up to 4"),
])  # fmt: skip
def test_sizes_that_cannot_be(split_I, texts, sizes, message):
    refused(message, split_images, split_I, np.arange(len(texts)), texts, sizes, seed=0)


PAIRS = read_shapes()


def test_every_sentence_names_every_label_and_every_class_is_in_every_split():
    rows = list(zip(*PAIRS.labels.values(), strict=True))
    assert len(rows) == len(set(rows)) == len(PAIRS.texts) == 2500
    for text, row in zip(PAIRS.texts, rows, strict=True):
        words = text.replace(",", "").replace(":", "").split()
        assert set(row) <= set(words), text
    assert {split: PAIRS.split.count(split) for split in SIZES} == SIZES
    for split in SIZES:
        for name, classes in ATTRIBUTES.items():
            labels = {v for v, own in zip(PAIRS.labels[name], PAIRS.split, strict=True) if own == split}
            assert labels == set(classes)


def test_the_colour_and_the_place_are_in_the_picture_which_is_the_same_again():
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
    again = read_shapes(["shape"])
    assert torch.equal(again.images.pixels, PAIRS.images.pixels)
    assert (again.texts, again.labels) == (PAIRS.texts, {"shape": PAIRS.labels["shape"]})
    refused(r"attributes='shap' is not one of .*; did you mean 'shape'", read_shapes, ["shap"])
