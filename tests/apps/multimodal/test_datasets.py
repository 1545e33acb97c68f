"""The datasets of images with texts, as ``moesaic data`` lists them."""

from __future__ import annotations

import pytest
from made_captions import write_products

from apps.data.cache import DataError
from apps.data.datasets import available, prepare
from apps.multimodal.datasets import PAIR_DATASETS


def test_what_is_computed_is_here_and_the_rest_has_to_be_brought(tmp_path):
    here = {name for name in [*PAIR_DATASETS, "synthetic"] if available(name, tmp_path)}
    assert here == {"shapes", "synthetic"}
    with pytest.raises(DataError, match=r"fashion_products cannot be fetched: set root .* products.csv, images112.npz"):
        prepare("fashion_products", cache_dir=tmp_path)


def test_a_folder_is_checked_for_its_layout(tmp_path):
    folder = write_products(tmp_path / "products", ["a", "b"])
    assert prepare("fashion_products", root=folder) == folder
    (folder / "images112.npz").unlink()
    with pytest.raises(ValueError, match=r"holds no images112.npz: fashion_products expects products.csv"):
        prepare("fashion_products", root=folder)
    with pytest.raises(ValueError, match=r"holds no annotations/captions_train2017.json: coco_captions expects"):
        prepare("coco_captions", root=folder)
