"""A user's folder of images becomes a configuration, with a test split where there is none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from apps.data.given import GivenData
from apps.vision.data import VisionData
from apps.vision.own_data import config_for


def write(folder: Path, count: int, side: int = 20) -> None:
    folder.mkdir(parents=True)
    for i in range(count):
        pixels = np.full((side, side + 4, 3), 10 * i, np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")


def given(root: Path, tmp_path: Path) -> GivenData:
    return GivenData((root,), None, tmp_path / "made")


def test_a_quarter_of_each_class_is_held_out(tmp_path):
    for name, count in (("cat", 12), ("dog", 8)):
        write(tmp_path / "photos" / name, count)
    made = config_for(given(tmp_path / "photos", tmp_path))
    assert made.notes == ("A quarter of the images of each of the 2 classes is held out for the test.",)
    arguments = made.config["data"]["init_args"]
    assert (arguments["image_size"], made.config["model"]["init_args"]["vit"]["patch_size"]) == (32, 4)
    data = VisionData(**arguments)
    # 12 / 4 + 8 / 4 test; a tenth of the other 15, rounded, validates.
    assert data.sizes() == {"train": 13, "val": 2, "test": 5}
    assert config_for(given(tmp_path / "photos", tmp_path)).config == made.config  # again, from the same links


def test_a_test_split_of_its_own_is_taken(tmp_path):
    for split, count in (("train", 8), ("test", 3)):
        for name in ("cat", "dog"):
            write(tmp_path / "photos" / split / name, count, side=50)
    made = config_for(given(tmp_path / "photos", tmp_path))
    assert made.notes == ()
    assert made.config["data"]["init_args"]["root"] == str(tmp_path / "photos")
    assert made.config["data"]["init_args"]["image_size"] == 64


@pytest.mark.parametrize("splits", [("Test", "Train"), ("test", "train", "validation"), ("test", "val")])
def test_splits_of_other_names_are_no_classes(tmp_path, splits):
    for split in splits:
        for name in ("cat", "dog"):
            write(tmp_path / "photos" / split / name, 8)
    with pytest.raises(
        ValueError, match=f"holds {', '.join(splits)}, which are no classes: rename .* train, val, test"
    ):
        config_for(given(tmp_path / "photos", tmp_path))
    # With a folder of another name, or with images of their own, they may be classes.
    write(tmp_path / "photos" / "third", 8)
    assert config_for(given(tmp_path / "photos", tmp_path)) is not None


def test_other_folders_are_not_images_and_wrong_ones_are_refused(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    assert config_for(given(empty, tmp_path)) is None
    write(tmp_path / "one" / "cat", 8)
    with pytest.raises(ValueError, match="holds images in 1 folders of classes"):
        config_for(given(tmp_path / "one", tmp_path))
    write(tmp_path / "one" / "dog", 3)
    with pytest.raises(ValueError, match="dog holds 3 images: a class needs 8 at least"):
        config_for(given(tmp_path / "one", tmp_path))
    (tmp_path / "one" / "dog").rename(tmp_path / "dog")
    write(tmp_path / "one" / "ox", 8)
    (tmp_path / "one" / "cat" / "0.png").write_text("no image")
    with pytest.raises(ValueError, match=r"0\.png cannot be read as an image"):
        config_for(given(tmp_path / "one", tmp_path))
