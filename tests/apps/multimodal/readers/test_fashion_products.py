"""Products in one table and one array of JPEG files."""

from __future__ import annotations

import numpy as np
import pytest
from made_captions import picture, write_csv, write_products

from apps.multimodal.pairs.pairs import ReadOptions
from apps.multimodal.readers.fashion_products import read_fashion_products

TITLES = ["Red shirt", "Green shirt", "Blue shoe"]
KINDS = ["shirt", "shirt", "shoe"]


def test_each_product_has_its_own_image_and_title(tmp_path):
    write_products(tmp_path, TITLES, kind=KINDS)
    table = [{"id": 102, "kind": "shoe", "title": "Blue shoe"}, {"id": 100, "kind": "shirt", "title": "Red shirt"}]
    write_csv(tmp_path / "products.csv", table)  # another order than the images', and one less
    pairs = read_fashion_products(tmp_path, ReadOptions(("kind",)))
    assert pairs.texts == ["Blue shoe", "Red shirt"]
    assert pairs.labels == {"kind": ["shoe", "shirt"]}
    assert [pairs.images.name(n) for n in range(2)] == ["102", "100"]
    for number, original in ((0, 2), (1, 0)):
        wanted = np.array(picture(original))[0, 0]
        mean = pairs.images.decode(number).float().mean((1, 2)).numpy()
        assert abs(mean - wanted).max() < 4  # JPEG


@pytest.mark.parametrize(
    "table, message",
    [
        ([{"id": 100, "title": "a"}, {"id": 999, "title": "b"}], "row 2: .*images112.npz has no image of '999'"),
        ([{"id": 100, "title": "a"}, {"id": 100, "title": "b"}], "row 2: the caption of '100' is 'b', and 'a' in"),
        ([{"id": 100, "title": ""}], "row 1: a caption of '100' is empty"),
        ([{"id": 100, "name": "a"}], "title='title' is not one of id, name"),
    ],
)
def test_a_bad_row_is_one_line(tmp_path, table, message):
    write_products(tmp_path, TITLES)
    write_csv(tmp_path / "products.csv", table)
    with pytest.raises(ValueError, match=message) as error:
        read_fashion_products(tmp_path, ReadOptions())
    assert "\n" not in str(error.value)


def test_an_array_of_another_layout_is_refused(tmp_path):
    write_products(tmp_path, TITLES)
    path = tmp_path / "images112.npz"
    content = path.read_bytes()
    locked = content.index(b"PK\1\2") + 8  # flags of the first array: with a password
    for damaged in (content[: len(content) // 2], content[:locked] + b"\1" + content[locked + 1 :]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"images112.npz is corrupt: it does not hold the arrays jpeg, offset and"):
            read_fashion_products(tmp_path, ReadOptions())
    np.savez(path, jpeg=np.zeros(9, np.uint8), offset=np.array([0, 5, 8]), id=np.array([1, 2]))
    with pytest.raises(ValueError, match=r"images112.npz is corrupt: offset must bound the 2 files in the 9 bytes"):
        read_fashion_products(tmp_path, ReadOptions())
    np.savez(path, jpeg=np.zeros(9, np.uint8), offset=np.array([0, 5, 9]), id=np.array([1, 1]))
    with pytest.raises(ValueError, match=r"images112.npz is corrupt: 2 images have 1 different ids"):
        read_fashion_products(tmp_path, ReadOptions())
