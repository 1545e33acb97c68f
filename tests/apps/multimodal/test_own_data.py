"""A user's catalog of images with titles becomes a configuration, and the datasets that have a name."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made_captions import write_csv, write_pictures, write_products
from refusals import refused

from apps import registry
from apps.data.cache import DataError
from apps.data.datasets import available, prepare
from apps.data.given import GivenData
from apps.multimodal.data import ImageTextData
from apps.multimodal.datasets import PAIR_DATASETS
from apps.multimodal.own_data import config_for


def given(path: Path, tmp_path: Path, target: str | None = None) -> GivenData:
    return GivenData((path,), target, tmp_path / "made")


def app_of(path: Path, tmp_path: Path, target: str | None = None) -> str:
    """Return the data class of the first app that takes the data, as ``moesaic verdict`` asks them."""
    for name in registry.OWN_DATA:
        made = registry.task_named(name).own_data(given(path, tmp_path, target))
        if made is not None:
            return made.config["data"]["class_path"]
    return "none"


def titles(count: int, image: str = "{}") -> list[dict[str, str]]:
    return [{"id": image.format(n), "price": str(n % 7), "title": f"red shoe number {n}"} for n in range(count)]


def test_a_catalog_is_recognized_and_can_be_read(tmp_path):
    shop = tmp_path / "shop"
    write_pictures(shop / "photos" / "all", 240)
    write_csv(shop / "catalogue.csv", titles(240))
    made = config_for(given(shop, tmp_path))
    assert made.notes == ("240 rows of images ('id') and texts ('title'); no caption is in two splits.",)
    arguments = made.config["data"]["init_args"]
    assert arguments["image_pattern"] == "photos/all/{}.png"
    assert (arguments["image_size"], made.config["model"]["init_args"]["tower"]["init_args"]["patch_size"]) == (32, 4)
    data = ImageTextData(**arguments, cache_dir=str(tmp_path / "cache"))
    assert data.sizes() == {"train": 192, "val": 24, "test": 24}
    assert config_for(given(shop / "catalogue.csv", tmp_path)).config == made.config
    assert app_of(shop, tmp_path) == "ImageTextData"


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_other_tables_with_paths_lists_and_splits(tmp_path, ending):
    shop = tmp_path / "shop"
    write_pictures(shop / "img", 200, side=50)
    splits = ["test"] * 9 + ["train"] * 191
    rows = [{"file": f"img/{n}.png", "texts": [f"a cup {n}", "one more"], "split": s} for n, s in enumerate(splits)]
    if ending == "jsonl":
        (shop / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    else:
        pq.write_table(pa.Table.from_pylist(rows), shop / "t.parquet")
    made = config_for(given(shop, tmp_path))
    assert made.notes == ("200 rows of images ('file') and texts ('texts'); column 'split' says the split.",)
    arguments = made.config["data"]["init_args"]
    names = ("image_column", "image_pattern", "caption_column", "split_column", "image_size")
    assert [arguments[name] for name in names] == ["file", "{}", "texts", "split", 64]


def test_the_images_column_names_most_files_and_datasets_have_layouts(tmp_path):
    write_pictures(tmp_path / "shop" / "photos", 240)
    # A product has two photos, and the first of them has its number for a name.
    rows = [{"sku": f"{n - n % 2}", "photo": f"{n}.png", "title": f"red shoe {n}"} for n in range(240)]
    write_csv(tmp_path / "shop" / "t.csv", rows)
    arguments = config_for(given(tmp_path / "shop", tmp_path)).config["data"]["init_args"]
    assert (arguments["image_column"], arguments["image_pattern"]) == ("photo", "photos/{}")
    write_products(tmp_path / "products", [f"title {n}" for n in range(20)])
    made = config_for(given(tmp_path / "products", tmp_path))
    assert made.config["data"]["init_args"]["dataset"] == "fashion_products"
    folder = tmp_path / "products"
    assert prepare("fashion_products", root=folder) == folder
    (folder / "images112.npz").unlink()
    refused(r"holds no images112.npz: fashion_products expects products.csv", prepare, "fashion_products", root=folder)
    rule = r"holds no annotations/captions_train2017.json: coco_captions expects"
    refused(rule, prepare, "coco_captions", root=folder)
    here = {name for name in [*PAIR_DATASETS, "synthetic"] if available(name, tmp_path)}
    assert here == {"shapes", "synthetic"}
    with pytest.raises(DataError, match=r"fashion_products cannot be fetched: set root .* products.csv, images112.npz"):
        prepare("fashion_products", cache_dir=tmp_path)


def test_data_of_other_apps_are_left_to_them_and_too_few_rows_are_refused(tmp_path):
    classes, shop, small = tmp_path / "classes", tmp_path / "shop", tmp_path / "small"
    for name in ("cat", "dog"):
        write_pictures(classes / name, 12)
    assert app_of(classes, tmp_path) == "VisionData"
    write_csv(classes / "labels.csv", [{"file": f"cat/{n}.png", "label": "cat"} for n in range(12)])
    assert app_of(classes, tmp_path) == "VisionData"  # a table without texts
    (classes / "labels.csv").write_text('a,b\n"x\n')
    assert app_of(classes, tmp_path) == "VisionData"
    table = write_csv(tmp_path / "table" / "rows.csv", [{**row, "size": len(row["id"])} for row in titles(100)])
    assert app_of(table, tmp_path, target="price") == "TableData"
    for folder, count in ((shop, 200), (small, 50)):
        write_pictures(folder, count)
        write_csv(folder / "catalogue.csv", titles(count))
    assert config_for(given(shop, tmp_path, "price")) is None
    assert config_for(given(tmp_path / "table", tmp_path)) is None
    refused(r"catalogue.csv has 50 rows with images: 200 are needed at least", config_for, given(small, tmp_path))
