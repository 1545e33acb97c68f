"""A folder of images with a table of the user's."""

from __future__ import annotations

import json

import pytest
from made_captions import write_csv, write_pictures

from apps.multimodal.pairs.pairs import ReadOptions
from apps.multimodal.readers.tables import read_table


def rows(*changes, **common):
    """Return rows of ``0.png``, ``1.png`` ... with a caption each, changed as is said."""
    return [{"image": f"{n}.png", "caption": f"text {n}", **common, **change} for n, change in enumerate(changes)]


def read(folder, table, **options):
    write_pictures(folder, 4)
    write_csv(folder / "t.csv", table)
    return read_table(folder, ReadOptions(**options))


def test_rows_of_one_image_are_its_captions(tmp_path):
    pairs = read(tmp_path, rows({}, {}, {"image": "0.png"}, {"image": "0.png", "caption": "text 0"}))
    assert pairs.texts == ["text 0", "text 1", "text 2"]
    assert pairs.image_N.tolist() == [0, 1, 0]
    assert pairs.images.name(1) == str(tmp_path / "1.png")
    assert pairs.left_out == {"a repeated caption": 1}


def test_a_list_holds_several_captions(tmp_path):
    write_pictures(tmp_path, 2)
    lines = [{"image": "0.png", "caption": ["a", "b"]}, {"image": "1.png", "caption": "c"}]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, lines)))
    pairs = read_table(tmp_path, ReadOptions())
    assert (pairs.texts, pairs.image_N.tolist()) == (["a", "b", "c"], [0, 0, 1])


def test_labels_splits_and_places_are_as_the_columns_say(tmp_path):
    write_pictures(tmp_path / "photos", 2)
    table = [
        {"sku": "0", "name": "x", "kind": " cup ", "part": "Train"},
        {"sku": "1", "name": "y", "kind": "", "part": "dev"},
    ]
    options = ReadOptions(
        ("kind",), image_column="sku", image_pattern="photos/{}.png", caption_column="name", split_column="part"
    )
    write_csv(tmp_path / "t.csv", table)
    pairs = read_table(tmp_path, options)
    assert pairs.labels == {"kind": ["cup", None]}
    assert pairs.split == ["train", "val"]


def test_a_label_is_that_of_the_rows_that_give_one(tmp_path):
    kinds = [("0.png", ""), ("0.png", " blue "), ("0.png", "blue"), ("0.png", " "), ("1.png", "red"), ("1.png", "")]
    table = [{"image": image, "caption": f"text {n}", "kind": kind} for n, (image, kind) in enumerate(kinds)]
    assert read(tmp_path, table, attributes=("kind",)).labels == {"kind": ["blue", "red"]}


@pytest.mark.parametrize(
    "table, options, message",
    [
        (rows({}, {"image": "9.png"}), {}, "t.csv, row 2: the image '.*9.png' is missing; data.on_bad_row=skip"),
        (rows({}, {"image": ""}), {}, "row 2: column 'image' is empty"),
        (rows({}, {"caption": " \t "}), {}, "row 2: a caption of '1.png' is empty; data.on_bad_row=skip"),
        (
            rows({"kind": "a"}, {"image": "0.png", "kind": "b"}),
            {"attributes": ("kind",)},
            "row 2: kind of '0.png' is 'b', and 'a' in .*row 1",
        ),
        (
            rows({"kind": ""}, {"image": "0.png", "kind": "a"}, {"image": "0.png", "kind": "b"}),
            {"attributes": ("kind",)},
            "row 3: kind of '0.png' is 'b', and 'a' in .*row 2",
        ),
        (rows({"id": "7"}, {"id": "7"}), {"id_column": "id"}, "row 2: the file of '7' is '.*1.png', and '.*0.png' in"),
        (rows({"id": "7"}, {"id": ""}), {"id_column": "id"}, "row 2: the image's id is empty"),
        (rows({"part": "test"}, {"part": "holdout"}), {"split_column": "part"}, "row 2: 'part' is 'holdout', which"),
        (
            rows({"part": "test"}, {"part": "train", "image": "0.png"}),
            {"split_column": "part"},
            "row 2: the split of '0.png' is 'train', and 'test' in .*row 1",
        ),
        (rows({}), {"attributes": ("kind",)}, "attributes='kind' is not one of image, caption"),
    ],
)
def test_a_bad_row_is_one_line(tmp_path, table, options, message):
    with pytest.raises(ValueError, match=message) as error:
        read(tmp_path, table, **options)
    assert "\n" not in str(error.value)


def test_bad_rows_are_left_out_and_counted(tmp_path):
    table = rows({}, {"image": "9.png"}, {"caption": ""}, {"image": ""})
    pairs = read(tmp_path, table, on_bad_row="skip")
    assert pairs.texts == ["text 0"]
    assert pairs.left_out == {"a missing image": 1, "an empty caption": 1, "no image": 1}
