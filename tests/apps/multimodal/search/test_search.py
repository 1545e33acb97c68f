"""Images are found by texts and by images, and classes by their names, by products that one can compute by hand."""

from __future__ import annotations

import base64
import io
import json
import math
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from made_page import Html
from PIL import Image
from refusals import refused
from small_pairs import pair_batch, retriever
from tinted import COLORS, Tinted, write_tinted
from torch import nn

from apps.multimodal.pairs.given import GivenInputs
from apps.multimodal.search import zero_shot
from apps.multimodal.search.page import thumbnail
from apps.multimodal.search.search import ImageSearch, match
from apps.multimodal.search.vectors import encode_images, encode_texts
from apps.multimodal.search.zero_shot import check_templates, class_scores, class_vectors, zero_shot_accuracy
from apps.multimodal.towers.loss import SoftmaxLoss


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    write_tinted(tmp_path / "shop", "red.png", "green.png", "blue.png", "purple.png")
    return tmp_path / "shop"


def search(shop: Path, **options) -> ImageSearch:
    return ImageSearch(Tinted(), GivenInputs(images=str(shop), **options), shop.parent / "cache")


def test_a_text_or_an_image_finds_the_images_with_the_largest_products(shop):
    # "blue dress" is (0, 0, 1): blue has 1, purple 0.6, red and green 0.
    (hits,) = search(shop, query="blue dress", top=2).hits
    assert [Path(path).name for path in hits.paths] == ["blue.png", "purple.png"]
    assert hits.scores == pytest.approx((1.0, 0.6), abs=1e-6)
    # "red blue" is (1, 0, 1) / sqrt 2: purple has 1.4 / sqrt 2.
    (hits,) = search(shop, query=["red blue"], top=1).hits
    assert (Path(hits.paths[0]).name, hits.scores[0]) == ("purple.png", pytest.approx(1.4 / 2**0.5, abs=1e-6))
    (hits,) = search(shop, query_image=str(shop / "purple.png")).hits
    assert [Path(path).name for path in hits.paths] == ["purple.png", "red.png", "blue.png", "green.png"]
    assert hits.scores == pytest.approx((1.0, 0.8, 0.6, 0.0), abs=1e-6)


def test_predictions_are_rows_and_lines_and_names_that_are_no_text_are_linked(shop, tmp_path):
    stream = search(shop, query="green", top=1).stream()
    (only,) = stream.predict(0)
    assert only.row == {"index": 0, "query": "green", "path": [f"{shop}/green.png"], "score": [1.0]}
    assert only.texts == [f"1.0000\t{shop}/green.png"]
    stream = search(shop, query=["green", "red"], top=1).stream()
    assert stream.count() == 2
    assert [p.texts for p in stream.predict(0)] == [[f"1\t1.0000\t{shop}/green.png"], [f"2\t1.0000\t{shop}/red.png"]]
    assert [p.row["query"] for p in stream.predict(1)] == ["red"]
    (only,) = search(shop, query_image=str(shop / "red.png")).stream().predict(0)
    assert only.row["query_image"] == str(shop / "red.png")
    assert json.dumps(only.row)
    (shop / "green.png").rename(shop / os.fsdecode(b"green\xff.png"))
    made = search(shop, query="green", top=1)
    (only,) = made.predictions(0)
    assert only.texts == [f"1.0000\t{shop}/green\ufffd.png"]
    made.write_page(tmp_path / "search.html")
    page = Html((tmp_path / "search.html").read_text())
    assert "green\ufffd.png" in page.text
    assert "shop/green%FF.png" in page.attributes("href")


def test_a_second_search_encodes_no_image_and_unread_ones_to_search_by_are_named(shop):
    first = search(shop, query="red")
    assert (len(first.hits), first.model.num_images) == (1, 4)
    second = search(shop, query="blue")
    assert (len(second.hits), second.model.num_images) == (1, 0)
    third = search(shop, query="blue")
    with torch.no_grad():
        third.model.scale[2] = 2.0
    assert (len(third.hits), third.model.num_images) == (1, 4)
    refused(r"none\.png cannot be read: No such file", lambda: search(shop, query_image=str(shop / "none.png")).hits)
    (shop / "note.txt").write_text("a note")
    refused(r"note\.txt is corrupt: it is no image", lambda: search(shop, query_image=str(shop / "note.txt")).hits)


def test_of_a_long_query_the_beginning_is_read_and_a_line_says_so(shop, caplog):
    (hits,) = search(shop, query=["green " * 10_000], top=1).hits
    assert hits.paths == (f"{shop}/green.png",)
    # [CLS], 10,000 words, [SEP]
    assert caplog.messages == ["query 1 of 1 has 10,002 subwords: the model reads the first 8 (max_tokens)"]
    caplog.clear()
    assert len(search(shop, query=["red " * 6]).hits) == 1
    assert not caplog.records


def test_the_page_shows_small_pictures_and_loads_nothing(shop, tmp_path):
    Image.new("RGBA", (400, 100), (*COLORS["red"], 128)).save(shop / "red <b>.png")
    made = search(shop, query=["red", "green"], top=3)
    made.write_page(tmp_path / "search.html")
    page = Html((tmp_path / "search.html").read_text())
    assert page.headings == [1, 2, 2, 2]
    for part in ("Images for “red”", "red <b>.png", "5 images of"):
        assert part in page.text
    sources = page.attributes("src")
    assert len(sources) == 6
    assert all(source.startswith("data:image/jpeg;base64,") for source in sources)
    assert all(page.attributes("alt"))
    links = [link for link in page.attributes("href") if not link.startswith("#")]
    assert set(links[:3]) == {"shop/red.png", "shop/red%20%3Cb%3E.png", "shop/purple.png"}
    assert (tmp_path / "search.html").stat().st_size < 100_000
    (tmp_path / "own.html").write_text("<p>a page of the user's</p>")
    refused("is no report of moesaic's", made.write_page, tmp_path / "own.html")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_images_of_every_mode_have_a_small_picture_of_their_colour(tmp_path, mode):
    path = tmp_path / ("image.tif" if mode == "CMYK" else "image.png")
    white = Image.new("RGB", (400, 100), "white")
    (Image.new(mode, white.size, 65535) if mode == "I;16" else white.convert(mode)).save(path)
    picture = thumbnail(str(path), ("1.",), tmp_path)
    assert (picture.size, picture.lines, picture.link) == ((176, 44), ("1.",), path.name)
    with Image.open(io.BytesIO(base64.b64decode(picture.source.partition(",")[2]))) as small:
        assert min(low for low, _ in small.getextrema()) > 250


def test_many_pictures_are_named_without_and_one_that_has_gone_since_says_so(shop, tmp_path, monkeypatch):
    monkeypatch.setattr("apps.multimodal.search.page._MOST_PICTURES", 3)
    search(shop, query=["red", "green"], top=2).write_page(tmp_path / "search.html")
    page = Html((tmp_path / "search.html").read_text())
    assert len(page.attributes("src")) == 3
    assert "Further images" in page.text
    assert thumbnail(str(tmp_path / "gone.png"), ("1.",), tmp_path).lines == ("1.", "cannot be read any more")


def test_texts_are_classes_of_images(shop):
    model = Tinted()
    model.loss = SoftmaxLoss(temperature=0.1).build()
    images = [shop / "red.png", Image.open(shop / "purple.png"), str(shop / "green.png")]
    red, purple, green = match(model, images, ["green", "red dress", "blue"], top=2)
    assert (red.path, red.text) == (str(shop / "red.png"), "red dress")
    assert red.probability == pytest.approx(1 / (1 + 2 * 2.718281828**-10), abs=1e-6)  # products 0, 1, 0, times 10
    assert (purple.path, list(purple.top)) == (None, ["red dress", "blue"])  # products 0, 0.8, 0.6
    assert purple.top["red dress"] / purple.top["blue"] == pytest.approx(2.718281828**2, rel=1e-4)
    assert (green.text, match(model, [], ["red"], top=1)) == ("green", [])
    assert encode_images(model, []).shape == encode_texts(model, []).shape == (0, 3)
    for arguments, rule in {
        (("a.png",), ("red",)): "cannot be read",
        ("a.png", ("red",)): r"images must be a list: write \[image\] for one image",
        ((shop / "red.png",), "red"): r"texts must be a list: write \[text\] for one text",
        ((shop / "red.png",), ("red", " ")): r"texts\[1\]=' ' is no text, or is empty",
        ((shop / "red.png",), ("red", "red")): "texts have 'red' twice",
        ((shop / "red.png",), ()): "texts is empty: give at least one text",
    }.items():
        refused(rule, match, model, *arguments, top=1)


class Alphabet(nn.Module):
    """A model whose vector of a text is (1, 0), or (0, 1) for one that ends in a full stop."""

    device, dim = torch.device("cpu"), 2

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.encoding = SimpleNamespace(text=SimpleNamespace(encode=self._encode))

    def _encode(self, texts):
        self.texts += texts
        return torch.tensor([[text.endswith(".")] for text in texts]).long()

    def text_vectors(self, text_BL):
        return torch.eye(2)[text_BL[:, 0]]


def test_a_class_has_the_mean_of_its_templates_and_a_tie_is_no_answer():
    model = Alphabet()
    vectors = class_vectors(model, ["red", "blue"], ("{}", "a photo of a {}.", "a {}."))
    assert model.texts == ["red", "a photo of a red.", "a red.", "blue", "a photo of a blue.", "a blue."]
    # The mean of (1, 0), (0, 1) and (0, 1) has the direction (1, 2), whose length is the root of 5.
    assert vectors.tolist() == [pytest.approx([1 / math.sqrt(5), 2 / math.sqrt(5)])] * 2
    class_CD = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    image_ND = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8], [0.8, 0.6]])
    # Image 0 is right; 1 and 2 have two classes with the same product; 3 is nearest to class 0, which is wrong.
    assert zero_shot_accuracy(image_ND, torch.tensor([0, 1, 2, 1]), class_CD) == 1 / 4
    assert zero_shot_accuracy(image_ND * math.nan, torch.tensor([0, 1, 2, 1]), class_CD) == 0
    assert zero_shot_accuracy(image_ND, torch.tensor([0, 0, 0, 0]), class_CD[:1].expand(3, 2)) == 0
    rule = r"report.templates is empty: give at least one template, such as 'a photo of a"
    refused(rule, check_templates, "report.templates", ())
    rule = r"the template 'a photo' must have \{\} once, where the class stands"
    refused(rule, check_templates, "report.templates", ("{}", "a photo"))


def test_scores_of_attributes():
    image_ND = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]])
    label_NA = torch.tensor([[0, -1, -1], [0, 1, -1], [1, -1, -1], [0, -1, -1]])
    trained_ND = torch.tensor([[1.0, 0.0], [0.9, 0.0], [0.0, 1.0], [0.0, 0.9]])
    training = trained_ND, torch.tensor([[0, 1, 0]] * 2 + [[1, 1, 0]] * 2)
    attributes = {"colour": ("red", "blue"), "size": ("small", "large"), "unknown": ("a", "b")}
    texts = {"colour": torch.tensor([[1.0, 0.0], [0.0, 1.0]])}
    colour, size = class_scores(image_ND, label_NA, attributes, texts, training)
    # Three of four images are red. The last one has the vector of a blue one.
    assert (colour.attribute, colour.classes, colour.images, colour.commonest) == ("colour", 2, 4, 3 / 4)
    assert (colour.zero_shot, colour.probe) == (3 / 4, 3 / 4)
    # One image has a known size; the training images have one size alone, so that there is nothing to learn.
    assert (size.images, size.commonest, size.zero_shot, size.probe) == (1, 1.0, None, None)


def test_each_image_is_read_once():
    model, batch = retriever().eval(), pair_batch(4)
    twice = batch._replace(image_B=torch.tensor([7, 8, 7, 9]), label_BA=torch.arange(8).view(4, 2))
    with torch.no_grad():
        vectors, labels = zero_shot.image_vectors(model, [twice, twice], most=5)
        assert labels.tolist() == [[0, 1], [2, 3], [6, 7]]
        torch.testing.assert_close(vectors, model.image_vectors(batch.image[[0, 1, 3]]))
        assert len(zero_shot.image_vectors(model, [twice, batch], most=3)[0]) == 3
        assert zero_shot.image_vectors(model, [], most=3)[1].shape == (0, 0)
