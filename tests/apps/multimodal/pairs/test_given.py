"""What a prediction is given in place of the data's pairs, and the columns of the vectors."""

import logging
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pytest
import torch
from PIL import Image
from pyarrow import parquet
from refusals import refused
from tinted import Tinted, write_tinted
from torch.testing import assert_close

from apps.cli.write.predictions import PredictionFile
from apps.multimodal.pairs.given import GivenInputs, columns_of, read_texts
from apps.multimodal.pairs.pairs import PairBatch


@pytest.mark.parametrize("options, rule", [
    ({"query": "a", "query_image": "b.png", "images": "shop"}, "search by texts or by images, not by both"),
    ({"query": "a"}, "query='a' needs data.images, the folder that is searched"),
    ({"query_image": ["a.png"]}, "query_image='a.png' needs data.images"),
    ({"query": [], "images": "shop"}, "query is an empty list"),
    ({"query": "", "images": "shop"}, "query 1 of 1 is empty"),
    ({"query": ["a", " \t"], "images": "shop"}, "query 2 of 2 is empty"),
    ({"query": "a", "images": "shop", "top": 0}, "top=0 is not at least 1"),
    ({"images": "shop", "top": 5}, "top=5 is of a search, which needs data.query or data.query_image"),
    ({"index": "a.safetensors"}, "index=a.safetensors is of a search"),
    ({"images": "shop", "predict_file": "a.csv"}, "images='shop' and predict_file='a.csv': give one of them"),
    ({"images": "shop", "on_bad_image": "skp"}, "on_bad_image='skp' is not one of error, skip; did you mean 'skip'"),
])  # fmt: skip
def test_what_cannot_be_given(options, rule):
    refused(rule, GivenInputs, **options)


def test_pairs_are_replaced_where_something_is_given_and_of_an_animated_image_the_first_frame_is_read(tmp_path):
    assert not GivenInputs().replaces_pairs
    folder, search = GivenInputs(images="shop"), GivenInputs(images="shop", query="red")
    assert (folder.replaces_pairs, folder.is_search, search.is_search) == (True, False, True)
    red, green = (Image.new("RGB", (6, 6), color) for color in ("red", "lime"))
    red.save(tmp_path / "a.gif", save_all=True, append_images=[green])
    (batch,) = GivenInputs(images=str(tmp_path)).loader(Tinted().encoding, 2, 0)
    assert batch.pixels[0, :, 0, 0].tolist() == [255, 0, 0]


def written(given: GivenInputs, path: Path) -> pa.Table:
    """Write the columns of what is given, two rows a batch, and read the file."""
    model = Tinted()
    with torch.no_grad(), PredictionFile(path).open() as file:
        for batch in given.loader(model.encoding, 2, 0):
            file.add_columns(columns_of(model, batch, None))
    return parquet.read_table(path)


def test_vectors_of_a_folder_are_columns_of_float32_and_bad_images_have_none(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    write_tinted(tmp_path / "shop", "a/red.png", "blue.png", "green.png")
    for name in ("1.png", "2.png"):  # their batch has no row
        (tmp_path / "shop" / name).write_text("no image")
    table = written(GivenInputs(images=str(tmp_path / "shop")), tmp_path / "out.parquet")
    assert table.schema.field("image_vector").type == pa.list_(pa.float32())
    assert table["index"].to_pylist() == [2, 3, 4]
    assert table["image"].to_pylist() == ["a/red.png", "blue.png", "green.png"]
    assert_close(torch.tensor(table["image_vector"].to_pylist()), torch.eye(3)[[0, 2, 1]])
    said = [r.getMessage().partition("/shop/")[2] for r in caplog.records]
    assert said == [f"{name}.png is corrupt: it is no image" for name in "12"]


def test_vectors_of_tables_and_of_pairs_stand_beside_their_names(tmp_path):
    (tmp_path / "t.csv").write_text("sku,title\n7,red dress\n008,green blue\n9,blue\n")
    given = GivenInputs(predict_file=str(tmp_path / "t.csv"), caption_column="title", id_column="sku")
    rows = written(given, tmp_path / "out.parquet").to_pydict()
    vectors, half = torch.tensor(rows.pop("text_vector")), 0.5**0.5
    assert rows == {"index": [0, 1, 2], "id": ["7", "008", "9"], "text": ["red dress", "green blue", "blue"]}
    assert_close(vectors, torch.tensor([[1, 0, 0], [0, half, half], [0, 0, 1.0]]))
    model, image, texts = Tinted(), torch.zeros(2, 3, 4, 4), ("red dress", "green")
    image[0, 0], image[1, 2] = 1.0, 1.0
    numbers, labels = torch.tensor([[4, 2], [0, 1], [10, 11]]), torch.empty(2, 0, dtype=torch.int64)
    batch = PairBatch(image, model.encoding.text.encode(texts), numbers[0], numbers[1], labels, numbers[2])
    data = SimpleNamespace(image_name=lambda number: f"image {number}", texts=texts)
    columns = columns_of(model, batch, data)
    assert list(columns) == ["index", "image", "text", "image_vector", "text_vector"]
    assert (columns["index"].tolist(), columns["text"].to_pylist()) == ([10, 11], [*texts])
    assert columns["image"].to_pylist() == ["image 4", "image 2"]
    assert_close(columns["image_vector"].detach(), torch.eye(3)[[0, 2]])
    assert_close(columns["text_vector"].detach(), torch.eye(3)[[0, 1]])


def test_texts_of_a_file(tmp_path):
    (tmp_path / "t.txt").write_text("red\n a\tdress \n")
    assert read_texts(tmp_path / "t.txt", "caption", None) == (None, ["red", "a dress"])
    (tmp_path / "t.jsonl").write_text('{"id": 1, "caption": ["red", "blue"]}\n{"id": 2, "caption": "green"}\n')
    assert read_texts(tmp_path / "t.jsonl", "caption", "id") == (["1", "1", "2"], ["red", "blue", "green"])
    for name, content, column, rule in (
        ("a.txt", "red\n\n", None, r"a\.txt, line 2: the text is empty"),
        ("a.txt", "red\n", "id", "id_column='id' is of a table"),
        ("a.txt", "", None, r"a\.txt is empty"),
        ("a.jsonl", '{"caption": []}', None, r"a\.jsonl' has no text"),
        ("a.csv", "caption\n \n", None, r"a\.csv, row 1: the text is empty"),
        ("a.csv", "titel\nred\n", None, "caption_column='caption' is not one of titel"),
        ("a.docx", "red", None, r"a\.docx' is no \.csv, .* file"),
    ):
        (tmp_path / name).write_text(content)
        refused(rule, read_texts, tmp_path / name, "caption", column)
