"""The classes to draw of, and images that cannot be learned from."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from apps.vision.generation.data import GenerationData, labels_of

NAMES = ("T-shirt/top", "Bag", "7")


def test_classes_go_by_name_and_else_by_number():
    # "7" is the name of class 2, and "1" of none
    assert labels_of(["Bag", "7", 0], NAMES) == [1, 2, 0]
    assert labels_of(["1"], NAMES) == [1]
    with pytest.raises(ValueError, match="classes=3 is none of the model's 3 classes: T-shirt/top, Bag, 7"):
        labels_of([3], NAMES)
    with pytest.raises(ValueError, match="classes=Bag is given twice"):
        labels_of([1, "Bag"], NAMES)
    with pytest.raises(ValueError, match=r"classes=\[\] names no class"):
        labels_of([], NAMES)


@pytest.mark.parametrize("classes", ["3,7", "3, 7", [3, 7], ["3", 7]])
def test_batches_are_of_one_class(classes):
    data = GenerationData(classes=classes, number=70, seed=5)
    batches = list(data.predict_dataloader())
    assert [(int(b.label[0]), len(b.label), b.index.tolist()[0]) for b in batches] == [
        (3, 64, 0), (3, 6, 64), (7, 64, 0), (7, 6, 64)
    ]  # fmt: skip
    assert all(batch.seed == 5 and bool((batch.label == batch.label[0]).all()) for batch in batches)


def test_all_classes_are_the_default():
    assert [int(batch.label[0]) for batch in GenerationData(number=1).predict_dataloader()] == list(range(10))
    assert [int(batch.label[0]) for batch in GenerationData(classes=4).predict_dataloader()] == [4]


def test_options_that_a_generator_has_no_use_for():
    for options, text in (
        ({"number": 0}, "number=0 must be at least 1"),
        ({"seed": -1}, "seed=-1 must not be negative"),
        ({"mixup_alpha": 0.2}, "mixup_alpha=0.2 mixes classes"),
        ({"predict_folder": "inbox"}, "predict_folder=inbox: a generator reads no images"),
    ):
        with pytest.raises(ValueError, match=text):
            GenerationData(**options)


def test_a_folder_of_one_image(tmp_path):
    for split in ("train", "test"):
        (tmp_path / split / "cat").mkdir(parents=True)
        Image.new("L", (8, 8), int(torch.tensor(9))).save(tmp_path / split / "cat" / f"{split}.png")
    data = GenerationData("image_folder", root=str(tmp_path), image_size=8, val_size=0)
    with pytest.raises(ValueError, match="image_folder has 1 training image: a generator needs 2 or more"):
        data.setup("fit")
