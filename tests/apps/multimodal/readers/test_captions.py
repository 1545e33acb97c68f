"""COCO and Flickr30k in their published layouts, made small."""

from __future__ import annotations

import json

import pytest
from made_captions import write_pictures

from apps.multimodal.pairs.pairs import ReadOptions
from apps.multimodal.readers.captions import read_coco, read_flickr30k


def write_coco(folder, year="2017"):
    (folder / "annotations").mkdir()
    for split, first in (("train", 0), ("val", 2)):
        names = write_pictures(folder / f"{split}{year}", 4)[first : first + 2]
        images = [{"id": 10 + n, "file_name": name} for n, name in enumerate(names, first)]
        captions = [{"image_id": i["id"], "caption": f"{w} {i['file_name']}"} for w in ("a", "b") for i in images]
        path = folder / f"annotations/captions_{split}{year}.json"
        path.write_text(json.dumps({"images": images, "annotations": captions}))
    return folder


@pytest.mark.parametrize("year", ["2017", "2014"])
def test_coco_tests_on_its_validation_images(tmp_path, year):
    pairs = read_coco(write_coco(tmp_path, year), ReadOptions())
    assert pairs.texts == ["a 0.png", "a 1.png", "b 0.png", "b 1.png", "a 2.png", "a 3.png", "b 2.png", "b 3.png"]
    assert pairs.image_N.tolist() == [0, 1, 0, 1, 2, 3, 2, 3]
    assert pairs.split == ["train", "train", "test", "test"]
    assert pairs.images.name(2) == str(tmp_path / f"val{year}/2.png")


def test_the_split_of_karpathy(tmp_path):
    write_pictures(tmp_path / "val2014", 4)
    images = [
        {"filepath": "val2014", "filename": f"{n}.png", "split": split, "sentences": [{"raw": f"a {n}"}, {"raw": "b"}]}
        for n, split in enumerate(("train", "restval", "val", "test"))
    ]
    (tmp_path / "dataset_coco.json").write_text(json.dumps({"images": images}))
    pairs = read_coco(tmp_path, ReadOptions())
    assert pairs.split == ["train", "train", "val", "test"]
    assert pairs.image_N.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    images[0]["split"] = "none"
    (tmp_path / "dataset_coco.json").write_text(json.dumps({"images": images}))
    with pytest.raises(ValueError, match=r"dataset_coco.json, image 1 has no known 'none'"):
        read_coco(tmp_path, ReadOptions())


def test_flickr30k_as_a_token_file_and_as_a_csv(tmp_path):
    write_pictures(tmp_path / "flickr30k-images", 2)
    lines = [f"{n}.png#{i}\tsaying {i} of {n}" for n in range(2) for i in range(2)]
    (tmp_path / "results_20130124.token").write_text("\n".join(lines))
    of_token = read_flickr30k(tmp_path, ReadOptions())
    (tmp_path / "results_20130124.token").unlink()
    header = "image_name| comment_number| comment"
    rows = [f"{n}.png| {i}| saying {i} of {n}" for n in range(2) for i in range(2)]
    # the published file has a row without its second bar
    (tmp_path / "results.csv").write_text("\n".join([header, *rows, "1.png| 4   A dog runs"]))
    with pytest.raises(ValueError, match=r"results.csv, row 5 has 2 of 3 values between '\|'; data.on_bad_row=skip"):
        read_flickr30k(tmp_path, ReadOptions())
    of_csv = read_flickr30k(tmp_path, ReadOptions(on_bad_row="skip"))
    assert of_csv.left_out == {"no caption": 1}
    for pairs in (of_token, of_csv):
        assert pairs.texts == ["saying 0 of 0", "saying 1 of 0", "saying 0 of 1", "saying 1 of 1"]
        assert pairs.image_N.tolist() == [0, 0, 1, 1]
        assert pairs.split == [None, None]


def test_files_of_another_layout_are_named(tmp_path):
    write_coco(tmp_path)
    path = tmp_path / "annotations/captions_val2017.json"
    path.write_text('{"images": []}')
    with pytest.raises(ValueError, match=r"captions_val2017.json is corrupt: it has no lists images and annotations"):
        read_coco(tmp_path, ReadOptions())
    path.write_text('{"images": [], "annotations": [{"image_id": 5, "caption": "x"}]}')
    with pytest.raises(ValueError, match=r"captions_val2017.json is corrupt: an image or annotation lacks 5"):
        read_coco(tmp_path, ReadOptions())
    path.write_text("{")
    with pytest.raises(ValueError, match=r"captions_val2017.json is corrupt: it is no JSON"):
        read_coco(tmp_path, ReadOptions())
    (tmp_path / "results_20130124.token").write_text("0.png saying\n")
    with pytest.raises(ValueError, match=r"results_20130124.token, row 1 has 1 of 2 values between '\\t'; data.on_bad"):
        read_flickr30k(tmp_path, ReadOptions())
