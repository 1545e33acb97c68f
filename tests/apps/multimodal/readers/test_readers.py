"""Tables of a user's and published layouts, made small; a bad file is one line that names file, row and rule."""

import gzip
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made_captions import picture, write_csv, write_pictures, write_products
from refusals import refused

from apps.multimodal.pairs.pairs import ReadOptions
from apps.multimodal.readers.captions import read_coco, read_flickr30k
from apps.multimodal.readers.fashion_products import read_fashion_products
from apps.multimodal.readers.rows import as_texts, find_table, rows_of
from apps.multimodal.readers.tables import read_table

PLAIN = [{"image": "a.png", "caption": "one, two"}, {"image": "b.png", "caption": 'say "three"'}]
ROLES = {"image": "image_column", "caption": "caption_column"}


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_every_kind_of_table_gives_the_same_rows(tmp_path):
    quoted = 'image,caption\na.png,"one, two"\n\nb.png,"say ""three"""\n'
    tables = [
        write(tmp_path / "t.csv", quoted),
        write(tmp_path / "t.tsv", 'image\tcaption\na.png\tone, two\nb.png\t"say ""three"""\n'),
        write(tmp_path / "t.jsonl", "\n".join(map(json.dumps, PLAIN))),
        tmp_path / "t.csv.gz",
        tmp_path / "t.parquet",
    ]
    tables[3].write_bytes(gzip.compress(quoted.encode()))
    pq.write_table(pa.Table.from_pylist(PLAIN), tables[4])
    for table in tables:
        assert list(rows_of(table, ROLES)) == [(f"{table}, row {n}", row) for n, row in enumerate(PLAIN, 1)]


def test_a_caption_may_go_over_lines_and_a_list_has_several(tmp_path):
    ((_, row),) = rows_of(write(tmp_path / "t.csv", 'image,caption\na.png,"one\ntwo"\n'), ROLES)
    assert row["caption"] == "one\ntwo"
    assert as_texts(["a", 7, None, float("nan")], "row 1", "caption") == ["a", "7", "", ""]
    # A mark of byte order and line ends of Windows are no text.
    (tmp_path / "t.csv").write_bytes(b"\xef\xbb\xbfimage,caption\r\na.png,one\r\n")
    (tmp_path / "t.jsonl").write_bytes(b'\xef\xbb\xbf{"image": "a.png", "caption": "one"}\r\n')
    for name in ("t.csv", "t.jsonl"):
        assert [row for _, row in rows_of(tmp_path / name, ROLES)] == [{"image": "a.png", "caption": "one"}]


@pytest.mark.parametrize("name, text, message", [
    ("t.csv", "image,title\na.png,x\n", "caption_column='caption' is not one of image, title"),
    ("t.csv", "image,captoin\na.png,x\n", "did you mean 'captoin'"),
    ("t.csv", "image,caption,image\na,b,c\n", "t.csv has two columns 'image'"),
    ("t.csv", "image,caption\na,b\nc\n", "row 2 has 1 values, and the header names 2 columns"),
    ("t.csv", 'image,caption\na,b\nc,"d\n', "row 2 cannot be read: .*is a quote not closed"),
    ("t.csv", "", "t.csv is empty"),
    ("t.csv", b"image,caption\na,caf\xe9\n", r"t.csv, line 2: byte 0xe9 is not valid UTF-8"),
    ("t.jsonl", '{"image": "a", "caption": "b"}\n{"image"\n', "line 2 is no JSON"),
    ("t.jsonl", "[1, 2]\n", r"line 1 is \[1, 2\], not an object"),
    ("t.jsonl", '{"image": "a"}\n', "caption_column='caption' is not one of image"),
    ("t.parquet", "no parquet", "t.parquet cannot be read"),
])  # fmt: skip
def test_a_bad_table_is_one_line(tmp_path, name, text, message):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(message, lambda: list(rows_of(tmp_path / name, ROLES)))


def test_the_only_table_needs_no_name(tmp_path):
    refused(r"holds no .csv, .* file: name one by table", find_table, tmp_path, None)
    table = write(tmp_path / "t.csv", "x\n")
    write(tmp_path / "notes.txt", "x\n")
    assert find_table(tmp_path, None) == table
    write(tmp_path / "u.jsonl", "{}\n")
    refused(r"holds several tables \(t.csv, u.jsonl\): name one", find_table, tmp_path, None)
    assert find_table(tmp_path, "t.csv") == table
    refused(r"table='v.csv': no such file", find_table, tmp_path, "v.csv")
    refused(r"table='notes.txt' is no .csv", find_table, tmp_path, "notes.txt")


def rows(*changes, **common):
    """Return rows of ``0.png``, ``1.png`` ... with a caption each, changed as is said."""
    return [{"image": f"{n}.png", "caption": f"text {n}", **common, **change} for n, change in enumerate(changes)]


def read(folder, table, **options):
    write_pictures(folder, 4)
    write_csv(folder / "t.csv", table)
    return read_table(folder, ReadOptions(**options))


def test_rows_of_one_image_are_its_captions_and_a_list_holds_several(tmp_path):
    pairs = read(tmp_path, rows({}, {}, {"image": "0.png"}, {"image": "0.png", "caption": "text 0"}))
    assert (pairs.texts, pairs.image_N.tolist()) == (["text 0", "text 1", "text 2"], [0, 1, 0])
    assert (pairs.images.name(1), pairs.left_out) == (str(tmp_path / "1.png"), {"a repeated caption": 1})
    (tmp_path / "t.csv").unlink()
    lines = [{"image": "0.png", "caption": ["a", "b"]}, {"image": "1.png", "caption": "c"}]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, lines)))
    pairs = read_table(tmp_path, ReadOptions())
    assert (pairs.texts, pairs.image_N.tolist()) == (["a", "b", "c"], [0, 0, 1])
    bad = rows({}, {"image": "9.png"}, {"caption": ""}, {"image": ""})
    pairs = read(tmp_path / "bad", bad, on_bad_row="skip")
    assert (pairs.texts, pairs.left_out) == (["text 0"], {"a missing image": 1, "an empty caption": 1, "no image": 1})


def test_labels_splits_and_places_are_as_the_columns_say(tmp_path):
    write_pictures(tmp_path / "photos", 2)
    (tmp_path / "t.csv").write_text("sku,name,kind,part\n0,x, cup ,Train\n1,y,,dev\n")
    columns = {"image_column": "sku", "caption_column": "name", "split_column": "part"}
    pairs = read_table(tmp_path, ReadOptions(("kind",), image_pattern="photos/{}.png", **columns))
    assert (pairs.labels, pairs.split) == ({"kind": ["cup", None]}, ["train", "val"])
    # A label is that of the rows that give one.
    kinds = [("0.png", ""), ("0.png", " blue "), ("0.png", "blue"), ("0.png", " "), ("1.png", "red"), ("1.png", "")]
    table = [{"image": image, "caption": f"text {n}", "kind": kind} for n, (image, kind) in enumerate(kinds)]
    assert read(tmp_path / "labels", table, attributes=("kind",)).labels == {"kind": ["blue", "red"]}


@pytest.mark.parametrize("table, options, message", [
    (rows({}, {"image": "9.png"}), {}, "t.csv, row 2: the image '.*9.png' is missing; data.on_bad_row=skip"),
    (rows({}, {"image": ""}), {}, "row 2: column 'image' is empty"),
    (rows({}, {"caption": " \t "}), {}, "row 2: a caption of '1.png' is empty; data.on_bad_row=skip"),
    (rows({"kind": "a"}, {"image": "0.png", "kind": "b"}), {"attributes": ("kind",)},
     "row 2: kind of '0.png' is 'b', and 'a' in .*row 1"),
    (rows({"kind": ""}, {"image": "0.png", "kind": "a"}, {"image": "0.png", "kind": "b"}), {"attributes": ("kind",)},
     "row 3: kind of '0.png' is 'b', and 'a' in .*row 2"),
    (rows({"id": "7"}, {"id": "7"}), {"id_column": "id"}, "row 2: the file of '7' is '.*1.png', and '.*0.png' in"),
    (rows({"id": "7"}, {"id": ""}), {"id_column": "id"}, "row 2: the image's id is empty"),
    (rows({"part": "test"}, {"part": "holdout"}), {"split_column": "part"}, "row 2: 'part' is 'holdout', which"),
    (rows({"part": "test"}, {"part": "train", "image": "0.png"}), {"split_column": "part"},
     "row 2: the split of '0.png' is 'train', and 'test' in .*row 1"),
    (rows({}), {"attributes": ("kind",)}, "attributes='kind' is not one of image, caption"),
])  # fmt: skip
def test_a_bad_row_is_one_line(tmp_path, table, options, message):
    refused(message, read, tmp_path, table, **options)


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
    assert (pairs.image_N.tolist(), pairs.split) == ([0, 1, 0, 1, 2, 3, 2, 3], ["train", "train", "test", "test"])
    assert pairs.images.name(2) == str(tmp_path / f"val{year}/2.png")


def test_karpathys_split_and_flickr30k_as_a_token_file_and_as_a_csv(tmp_path):
    write_pictures(tmp_path / "val2014", 4)
    images = [
        {"filepath": "val2014", "filename": f"{n}.png", "split": split, "sentences": [{"raw": f"a {n}"}, {"raw": "b"}]}
        for n, split in enumerate(("train", "restval", "val", "test"))
    ]
    (tmp_path / "dataset_coco.json").write_text(json.dumps({"images": images}))
    pairs = read_coco(tmp_path, ReadOptions())
    assert (pairs.split, pairs.image_N.tolist()) == (["train", "train", "val", "test"], [0, 0, 1, 1, 2, 2, 3, 3])
    images[0]["split"] = "none"
    (tmp_path / "dataset_coco.json").write_text(json.dumps({"images": images}))
    refused(r"dataset_coco.json, image 1 has no known 'none'", read_coco, tmp_path, ReadOptions())
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
        assert (pairs.image_N.tolist(), pairs.split) == ([0, 0, 1, 1], [None, None])


def test_files_of_another_layout_are_named(tmp_path):
    write_coco(tmp_path)
    path = tmp_path / "annotations/captions_val2017.json"
    for content, rule in (
        ('{"images": []}', "it has no lists images and annotations"),
        ('{"images": [], "annotations": [{"image_id": 5, "caption": "x"}]}', "an image or annotation lacks 5"),
        ("{", "it is no JSON"),
    ):
        path.write_text(content)
        refused(f"captions_val2017.json is corrupt: {rule}", read_coco, tmp_path, ReadOptions())
    (tmp_path / "results_20130124.token").write_text("0.png saying\n")
    rule = r"results_20130124.token, row 1 has 1 of 2 values between '\\t'; data.on_bad"
    refused(rule, read_flickr30k, tmp_path, ReadOptions())


TITLES = ["Red shirt", "Green shirt", "Blue shoe"]
KINDS = ["shirt", "shirt", "shoe"]


def test_each_product_has_its_own_image_and_title(tmp_path):
    write_products(tmp_path, TITLES, kind=KINDS)
    table = [{"id": 102, "kind": "shoe", "title": "Blue shoe"}, {"id": 100, "kind": "shirt", "title": "Red shirt"}]
    write_csv(tmp_path / "products.csv", table)  # another order than the images', and one less
    pairs = read_fashion_products(tmp_path, ReadOptions(("kind",)))
    assert (pairs.texts, pairs.labels) == (["Blue shoe", "Red shirt"], {"kind": ["shoe", "shirt"]})
    assert [pairs.images.name(n) for n in range(2)] == ["102", "100"]
    for number, original in ((0, 2), (1, 0)):
        wanted = np.array(picture(original))[0, 0]
        assert abs(pairs.images.decode(number).float().mean((1, 2)).numpy() - wanted).max() < 4  # JPEG


@pytest.mark.parametrize("table, message", [
    ([{"id": 100, "title": "a"}, {"id": 999, "title": "b"}], "row 2: .*images112.npz has no image of '999'"),
    ([{"id": 100, "title": "a"}, {"id": 100, "title": "b"}], "row 2: the caption of '100' is 'b', and 'a' in"),
    ([{"id": 100, "title": ""}], "row 1: a caption of '100' is empty"),
    ([{"id": 100, "name": "a"}], "title='title' is not one of id, name"),
])  # fmt: skip
def test_a_bad_product_is_one_line(tmp_path, table, message):
    write_products(tmp_path, TITLES)
    write_csv(tmp_path / "products.csv", table)
    refused(message, read_fashion_products, tmp_path, ReadOptions())


def test_an_array_of_another_layout_is_refused(tmp_path):
    def corrupt(rule):
        refused(f"images112.npz is corrupt: {rule}", read_fashion_products, tmp_path, ReadOptions())

    write_products(tmp_path, TITLES)
    path = tmp_path / "images112.npz"
    content = path.read_bytes()
    locked = content.index(b"PK\1\2") + 8  # flags of the first array: with a password
    for damaged in (content[: len(content) // 2], content[:locked] + b"\1" + content[locked + 1 :]):
        path.write_bytes(damaged)
        corrupt("it does not hold the arrays jpeg, offset and")
    np.savez(path, jpeg=np.zeros(9, np.uint8), offset=np.array([0, 5, 8]), id=np.array([1, 2]))
    corrupt("offset must bound the 2 files in the 9 bytes")
    np.savez(path, jpeg=np.zeros(9, np.uint8), offset=np.array([0, 5, 9]), id=np.array([1, 1]))
    corrupt("2 images have 1 different ids")
