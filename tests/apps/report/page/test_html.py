"""A page as HTML: whole, loading nothing, readable without its charts."""

from __future__ import annotations

import json
import re

import pytest
from made_page import PNG, Html, made_page

from apps.report.page import (
    MOST_FIGURES,
    Gallery,
    Page,
    Picture,
    Section,
    Table,
    Thumbnail,
    Words,
    html,
)
from apps.report.page.charts import BarChart
from apps.report.page.writing import from_json, to_json


@pytest.fixture
def short_library(monkeypatch) -> None:
    """Put a line in place of the library's megabyte, which takes seconds to make."""
    monkeypatch.setattr(html, "script", lambda: "window.vegaEmbed = () => {};")


def rendered(page: Page, folder) -> tuple[str, Html]:
    source = html.render(Page(**{**vars(page), "sections": tuple(s.below(folder) for s in page.sections)}))
    return source, Html(source)


def test_a_page_has_everything_and_loads_nothing(tmp_path, short_library):
    source, page = rendered(made_page(tmp_path), tmp_path)
    assert ("html", {"lang": "en"}) in page.tags
    assert [tag for tag, _ in page.tags].count("main") == 1
    assert page.text.index("Sparse wins: +1.1") < page.text.index("97.2 ± 0.4") < page.text.index("It rises.")
    # h1, Verdict, Quality and its chart, Training, Experts with two, Below and Inner, Sorted.
    assert page.headings == [1, 2, 2, 3, 2, 3, 2, 3, 3, 2, 3, 2]
    loads = [*page.attributes("src"), *page.attributes("href")]
    assert all(value.startswith(("#", "data:image/png;base64,")) for value in loads)
    policy = next(a["content"] for tag, a in page.tags if tag == "meta" and "http-equiv" in a)
    assert policy is not None
    assert policy.startswith("default-src 'none'; img-src data:;")
    ids = page.attributes("id")
    assert len(ids) == len(set(ids))
    assert {value[1:] for value in page.attributes("href")} <= set(ids)
    assert set(page.attributes("aria-labelledby")) <= set(ids)
    assert page.attributes("alt") == ["a black point"]


def test_a_gallery_has_its_pictures_in_order_with_words_for_those_who_see_none(short_library):
    source = "data:image/jpeg;base64,AAAA"
    pictures = (Thumbnail(source, (4, 2), "a <cat>", ("1. 0.9", "cat.jpg"), "cat.jpg"), Thumbnail(source, (2, 2), "b"))
    gallery = Gallery("Best first", pictures, note="Two of them.")
    assert from_json(json.loads(json.dumps(to_json(gallery)))) == gallery
    page = Html(html.render(Page("Found", (), None, (Section("Images", (gallery,)),))))
    assert page.attributes("alt") == ["a <cat>", "b"]
    assert page.attributes("width") == ["4", "2"]
    assert [link for link in page.attributes("href") if not link.startswith("#")] == ["cat.jpg"]
    assert set(page.attributes("aria-labelledby")) <= set(page.attributes("id"))
    assert page.text.index("1. 0.9") < page.text.index("cat.jpg") < page.text.index("Two of them.")


def test_words_stand_with_their_labels_as_text(tmp_path, short_library):
    source, page = rendered(made_page(tmp_path), tmp_path)
    # The last expert of 3 is 2: a choice of 3 is none.
    line = "read\nblock 1: \n1 0\nblock 2: \n–\nloss: \n2\ning\nblock 1: \n2\nblock 2: \n0\nloss: \n–\n"
    assert line in page.text
    assert "Below each word: block 1, block 2, loss.\n" in page.text
    assert page.attributes("class").count("joined") == 1  # "ing"
    # The colour of expert 1 is light, that of expert 0 dark.
    styles = page.attributes("style")
    assert "background:#E69F00;color:#000" in styles
    assert "background:#0072B2;color:#fff" in styles
    assert "background:color-mix(in srgb,var(--link) 10%,transparent)" in styles  # 0.5 of 2, of 40 %
    assert "background:color-mix(in srgb,var(--link) 40%,transparent)" in styles


def test_words_of_another_length_are_refused():
    with pytest.raises(ValueError, match=r"'Line': 1 of 'block 1' for 2 words"):
        Words("Line", ("a", "b"), {"block 1": ("0",)})


def test_words_come_back_from_json(tmp_path):
    (words,) = [part for section in made_page(tmp_path).sections for part in section.parts if isinstance(part, Words)]
    kept = from_json(json.loads(json.dumps(to_json(words))))
    assert repr(kept) == repr(words)  # NaN is not equal to itself


def test_texts_cannot_be_markup(tmp_path, short_library):
    source, page = rendered(made_page(tmp_path), tmp_path)
    assert "<title>Sparse &amp; dense</title>" in source
    assert "moesaic <test>" in page.text
    assert not [tag for tag, _ in page.tags if tag in ("b", "test")]
    embedded = re.search(r'<script type="application/json" id="charts">(.*?)</script>', source)
    assert embedded is not None
    assert "<" not in embedded[1]
    specs = json.loads(embedded[1])
    assert list(specs) == ["chart-cost", "chart-curve", "chart-load", "chart-classes"]


def test_each_chart_has_its_numbers(tmp_path, short_library):
    _, page = rendered(made_page(tmp_path), tmp_path)
    for row in ("96.2 to 98.2", "6.6", "90.0"):
        assert f"\n{row}\n" in page.text
    assert page.text.count("Numbers\n") == 4


def test_the_whole_page_with_its_library_stays_below_the_limit(tmp_path):
    large = tmp_path / "large.png"
    large.write_bytes(PNG + bytes(2_000_000))  # 2.7 MB as text, of the 4.1 beside the library
    pictures = tuple(Picture(str(large), f"picture {i}") for i in range(2))
    source = html.render(Page("Large", ("It is.",), sections=(Section("Pictures", pictures),)))
    page = Html(source)
    assert len(source.encode()) < html.MOST_BYTES
    assert page.attributes("alt") == ["picture 0"]
    assert "picture 1: large.png is left out, to keep this file below 5 MB." in page.text
    assert "vegaEmbed" in html.script()


def test_refused_parts():
    with pytest.raises(ValueError, match="row 1 has 1 cells for 2 columns"):
        Table("t", ("a", "b"), (("1", "2"), ("3",)))
    figures = Table("", ("a",), (("1",),) * (MOST_FIGURES + 1))
    with pytest.raises(ValueError, match="figures have 11 lines: at most 10"):
        Page("t", (), figures)


def test_charts_without_addresses_for_them_are_an_error_and_no_abort(monkeypatch):
    chart = BarChart("t", "s", "x", "y", ("0",), {"a": (1.0,)})
    monkeypatch.setattr("resource.getrlimit", lambda _: (8 * 2**30, 8 * 2**30))
    with pytest.raises(RuntimeError, match=r"unlimited, or none$"):
        html.check_addresses(", or none")
    with pytest.raises(RuntimeError, match=r"charts need 72 GiB .* may have 8.0 GiB: ulimit -v unlimited$"):
        html.png_of([chart], "t")
    monkeypatch.setattr("resource.getrlimit", lambda _: (-1, -1))
    assert html.png_of([chart], "t").startswith(b"\x89PNG")
