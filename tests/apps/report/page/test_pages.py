"""Pages as HTML that loads nothing, as files and on the terminal, the index of runs, and sections that are kept."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil

import pytest
from made_page import PNG, Html, made_page

from apps.report.page import (
    FILE,
    MOST_FIGURES,
    SECTIONS,
    Code,
    Gallery,
    Page,
    Picture,
    Section,
    Table,
    Text,
    Thumbnail,
    Words,
    html,
    load_sections,
    save_sections,
    show_page,
    write_page,
)
from apps.report.page.charts import BarChart
from apps.report.page.writing import from_json, markdown, read_reports, to_json, write_index


@pytest.fixture(autouse=True)
def short_library(monkeypatch) -> None:
    """Put a line in place of the library's megabyte, which takes seconds to make."""
    monkeypatch.setattr(html, "script", lambda: "window.vegaEmbed = () => {};")


def rendered(page: Page, folder) -> tuple[str, Html]:
    source = html.render(Page(**{**vars(page), "sections": tuple(s.below(folder) for s in page.sections)}))
    return source, Html(source)


def test_a_page_has_everything_and_loads_nothing(tmp_path):
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
    assert Section("Nothing", sections=(Section("Inner"),)).is_empty
    assert "Nothing" not in page.text  # an empty section is left out


def test_a_gallery_has_its_pictures_in_order_with_words_for_those_who_see_none():
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


def test_words_stand_with_their_labels_as_text(tmp_path):
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
    (words,) = [part for section in made_page(tmp_path).sections for part in section.parts if isinstance(part, Words)]
    assert repr(from_json(json.loads(json.dumps(to_json(words))))) == repr(words)  # NaN is not equal to itself


def test_texts_cannot_be_markup_and_each_chart_has_its_numbers(tmp_path):
    source, page = rendered(made_page(tmp_path), tmp_path)
    assert "<title>Sparse &amp; dense</title>" in source
    assert "moesaic <test>" in page.text
    assert not [tag for tag, _ in page.tags if tag in ("b", "test")]
    embedded = re.search(r'<script type="application/json" id="charts">(.*?)</script>', source)
    assert embedded is not None
    assert "<" not in embedded[1]
    specs = json.loads(embedded[1])
    assert list(specs) == ["chart-cost", "chart-curve", "chart-load", "chart-classes"]
    for row in ("96.2 to 98.2", "6.6", "90.0"):
        assert f"\n{row}\n" in page.text
    assert page.text.count("Numbers\n") == 4


def test_the_whole_page_with_its_library_stays_below_the_limit(tmp_path, monkeypatch):
    monkeypatch.undo()  # the library itself
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
    with pytest.raises(ValueError, match=r"'Line': 1 of 'block 1' for 2 words"):
        Words("Line", ("a", "b"), {"block 1": ("0",)})


def test_charts_without_addresses_for_them_are_an_error_and_no_abort(monkeypatch):
    chart = BarChart("t", "s", "x", "y", ("0",), {"a": (1.0,)})
    monkeypatch.setattr("resource.getrlimit", lambda _: (8 * 2**30, 8 * 2**30))
    with pytest.raises(RuntimeError, match=r"unlimited, or none$"):
        html.check_addresses(", or none")
    with pytest.raises(RuntimeError, match=r"charts need 72 GiB .* may have 8.0 GiB: ulimit -v unlimited$"):
        html.png_of([chart], "t")
    monkeypatch.setattr("resource.getrlimit", lambda _: (-1, -1))
    assert html.png_of([chart], "t").startswith(b"\x89PNG")


def test_sections_come_back_with_pictures_by_their_paths_and_a_damaged_file_is_named(tmp_path):
    page = made_page(tmp_path)
    save_sections(page.sections, tmp_path)
    kept = load_sections(tmp_path)
    assert repr(kept) == repr(tuple(s.below(tmp_path) for s in page.sections))  # NaN differs from NaN
    assert kept[2].parts[2].path == str(tmp_path / "point.png")
    assert load_sections(tmp_path / "none") == ()
    by_task = {"class": (1.0, 2.0), "price": (3.0,)}
    assert from_json(to_json(by_task)) == by_task
    for text, reason in (("[", "Expecting"), ('{"class": "Popen"}', "'Popen' is no part of a page")):
        (tmp_path / SECTIONS).write_text(text)
        with pytest.raises(ValueError, match=f"sections.json holds no part of a report .*{reason}"):
            load_sections(tmp_path)


def test_a_page_is_written_beside_its_summary(tmp_path, capsys):
    path = write_page(made_page(tmp_path), tmp_path / FILE)
    assert capsys.readouterr().out == f"report: {path}\n"
    about = json.loads((tmp_path / "report.json").read_text())
    assert about["sections"] == []
    figures = {"test top1, %": 97.2, "MFLOPs": 6.6}
    assert about["entries"][0] == {"class": "Entry", "name": "sparse", "figures": figures}
    write_page(made_page(tmp_path, "again"), path)
    assert "<title>again</title>" in path.read_text()


def test_a_file_of_the_users_stays_and_the_terminal_has_the_verdict_and_the_figures(tmp_path, capsys):
    (tmp_path / FILE).write_text("<html>mine</html>")
    with pytest.raises(ValueError, match=r"report\.html is no report of moesaic's"):
        write_page(made_page(tmp_path), tmp_path / FILE)
    assert (tmp_path / FILE).read_text() == "<html>mine</html>"
    show_page(made_page(tmp_path))
    out = capsys.readouterr().out
    assert out.startswith("Sparse wins: +1.1 points")
    assert "97.2 ± 0.4" in out
    assert "It rises" not in out


def test_the_index_lists_the_newest_first_and_leaves_other_files(tmp_path, capsys, monkeypatch):
    runs = tmp_path / "runs"
    for name, date in (("old", "2026-01-01T00:00:00"), ("new", "2026-02-02T00:00:00")):
        (runs / name).mkdir(parents=True)
        assert write_index(runs) is None  # one report has no index yet
        write_page(dataclasses.replace(made_page(runs / name, f"run {name}"), date=date), runs / name / FILE)
    shutil.copytree(runs / "old", runs / "suite" / "deep")
    (runs / "foreign").mkdir()
    (runs / "foreign" / FILE).write_text("<html>mine</html>")
    (runs / "foreign" / "report.json").write_text("{}")
    shutil.copytree(runs / "old", runs / "damaged")
    (runs / "damaged" / "report.json").write_text("{}")
    capsys.readouterr()
    monkeypatch.setattr(html, "script", lambda: pytest.fail("the index carries the library of charts"))
    path = write_index(runs)
    assert path is not None
    left_out, last = capsys.readouterr().out.splitlines()
    assert left_out.startswith(f"left out of the index: {runs / 'damaged' / 'report.json'} holds no part of a report")
    assert last == f"index of 3 runs: {path}"
    shutil.rmtree(runs / "damaged")
    earlier = "new/earlier/2/report.html"
    shutil.copytree(runs / "old", (runs / earlier).parent)
    names = ["new/report.html", earlier, "old/report.html", "suite/deep/report.html"]
    assert list(read_reports(runs)) == names
    page = Html(path.read_text())
    assert page.text.index("\nnew\n") < page.text.index("\nold\n")
    links = [href for href in page.attributes("href") if href.endswith(FILE)]
    assert links == [name for run in ("new", "old", "suite/deep") for name in [f"{run}/report.html"] * 2]
    assert "choose new/report.html: sparse" not in page.attributes("aria-label")
    assert "choose new: sparse" in page.attributes("aria-label")
    points = json.loads(re.search(r'id="points">(.*?)</script>', path.read_text())[1])
    figures = {"test top1, %": 97.2, "MFLOPs": 6.6}
    assert points[:2] == [["new: sparse", figures], ["new: dense", {"test top1, %": 96.1}]]
    path.write_text("<html>mine</html>")
    assert write_index(runs) is None
    assert path.read_text() == "<html>mine</html>"


def test_a_page_as_markdown_has_its_texts_and_tables_and_nothing_that_is_closed():
    parts = (Text.of("one"), Text.of("two", "three"), Code("Command", "run"), Code("Config", "k: 1", closed=True))
    parts += (Table("", ("", "a|b"), (("x", "1"),)),)
    inner = Section("Inner", (Text.of("deep"),))
    page = Page("T", ("First.", "Second."), sections=(Section("S", parts, (inner,)), Section("Empty")))
    assert markdown(page) == (
        "# T\n\n**First.**  \nSecond.  \n\n## S\n\none\n\n- two\n- three\n\nCommand:\n\n```\nrun\n```\n\n"
        "|  | a\\|b |\n| --- | ---: |\n| x | 1 |\n\n### Inner\n\ndeep\n"
    )
