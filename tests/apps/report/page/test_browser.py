"""Pages in a headless Chromium: no error, marks in every chart, controls that work, and what axe-core finds."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from browsing import browser as browser, needs_chromium, opened, serious
from made_page import MARKS, made_page

from apps.report.page import FILE, write_page
from apps.report.page.writing import write_index

pytestmark = needs_chromium()
_COUNT = """(id) => document.getElementById(id).querySelectorAll(
    '.mark-symbol path, .mark-rect path, .mark-line path, .mark-rule line').length"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """The folder of two runs and their index."""
    folder = tmp_path_factory.mktemp("runs")
    for name in ("first", "second"):
        (folder / name).mkdir()
        page = made_page(folder / name)
        page = dataclasses.replace(page, sections=tuple(s.below(folder / name) for s in page.sections))
        write_page(page, folder / name / FILE)
    write_index(folder)
    return folder


def drawn(browser, path: Path, width: int = 1280, scheme: str = "light"):
    return opened(browser, path.as_uri(), "html[data-drawn]", width, scheme)


@pytest.mark.parametrize("width, scheme", [(1280, "light"), (390, "dark")])
def test_a_report_draws_every_chart_without_an_error(runs, browser, width, scheme):
    tab, notes = drawn(browser, runs / "first" / FILE, width, scheme)
    assert notes == []
    assert {name: tab.evaluate(_COUNT, name) >= least for name, least in MARKS.items()} == dict.fromkeys(MARKS, True)
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    light = tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert light == (scheme == "light")
    for details in tab.query_selector_all("details"):
        details.evaluate("(d) => { d.open = true; }")
    assert serious(tab) == []
    tab.close()


def test_tables_sort_and_legends_choose(runs, browser):
    tab, notes = drawn(browser, runs / "first" / FILE)
    table = tab.locator("table.sortable")
    heading = table.get_by_role("button", name="share, %")
    heading.focus()
    tab.keyboard.press("Enter")
    assert table.locator("tbody th").all_inner_texts() == ["b", "a"]  # 9 before 10, as numbers
    tab.keyboard.press("Enter")
    assert table.locator("tbody th").all_inner_texts() == ["a", "b"]
    assert table.locator("th[aria-sort]").get_attribute("aria-sort") == "descending"
    faded = "[...document.querySelectorAll('#chart-curve .mark-line path')].map((p) => p.getAttribute('opacity'))"
    before = tab.evaluate(faded)
    tab.locator("#chart-curve .mark-text.role-legend-label text", has_text="dense").click()
    tab.wait_for_function(f"JSON.stringify({faded}) !== {before!r}.toString()")
    assert tab.evaluate(faded) == ["0.1", "0.9"]
    assert notes == []
    tab.close()


def test_the_index_filters_chooses_and_draws(runs, browser):
    tab, notes = drawn(browser, runs / "index.html", 390)
    shown = "[...document.querySelectorAll('#list tbody tr')].filter((r) => !r.hidden).length"
    assert tab.evaluate(shown) == 4
    tab.get_by_label("Search").fill("second")
    assert tab.evaluate(shown) == 2
    tab.get_by_label("choose second: dense").check()
    tab.get_by_label("only those chosen").check()
    assert tab.evaluate(shown) == 1
    assert tab.locator("#count").inner_text() == "1 of 4 rows"
    circles = "document.querySelectorAll('#choice circle').length"
    assert tab.evaluate(circles) == 2  # both models named sparse have FLOPs
    tab.get_by_label("horizontal axis").select_option("test top1, %")
    assert tab.evaluate(circles) == 4
    # At equal values the points lie on a diagonal: 96.1 and 97.2 on both axes.
    titles = "[...document.querySelectorAll('#choice title')].map((t) => t.textContent)"
    assert tab.evaluate(titles)[0] == "first: sparse: 97.2 at 97.2"
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390
    assert serious(tab) == []
    tab.get_by_role("link", name="second").first.click()
    tab.wait_for_selector("html[data-drawn]")
    assert tab.title() == "Sparse & dense"
    assert notes == []
    tab.close()
