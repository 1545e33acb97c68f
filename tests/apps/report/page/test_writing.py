"""Pages as files and on the terminal, the index of runs, and sections that are kept."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil

import pytest
from made_page import Html, made_page

from apps.report.page import (
    FILE,
    SECTIONS,
    Code,
    Page,
    Section,
    Table,
    Text,
    html,
    load_sections,
    save_sections,
    show_page,
    write_page,
)
from apps.report.page.writing import from_json, markdown, read_reports, to_json, write_index


@pytest.fixture(autouse=True)
def short_library(monkeypatch) -> None:
    """Put a line in place of the library's megabyte, which takes seconds to make."""
    monkeypatch.setattr(html, "script", lambda: "window.vegaEmbed = () => {};")


def test_sections_come_back_with_pictures_by_their_paths(tmp_path):
    page = made_page(tmp_path)
    save_sections(page.sections, tmp_path)
    kept = load_sections(tmp_path)
    assert repr(kept) == repr(tuple(s.below(tmp_path) for s in page.sections))  # NaN differs from NaN
    assert kept[2].parts[2].path == str(tmp_path / "point.png")
    assert load_sections(tmp_path / "none") == ()
    by_task = {"class": (1.0, 2.0), "price": (3.0,)}
    assert from_json(to_json(by_task)) == by_task


@pytest.mark.parametrize("text, reason", [("[", "Expecting"), ('{"class": "Popen"}', "'Popen' is no part of a page")])
def test_a_damaged_file_is_named(tmp_path, text, reason):
    (tmp_path / SECTIONS).write_text(text)
    with pytest.raises(ValueError, match=f"sections.json holds no part of a report .*{reason}"):
        load_sections(tmp_path)


def test_a_page_is_written_beside_its_summary(tmp_path, capsys):
    path = write_page(made_page(tmp_path), tmp_path / FILE)
    assert capsys.readouterr().out == f"report: {path}\n"
    about = json.loads((tmp_path / "report.json").read_text())
    assert about["sections"] == []
    assert about["entries"][0] == {
        **{"class": "Entry", "name": "sparse"},
        "figures": {"test top1, %": 97.2, "MFLOPs": 6.6},
    }
    write_page(made_page(tmp_path, "again"), path)
    assert "<title>again</title>" in path.read_text()


def test_a_file_of_the_users_stays(tmp_path):
    (tmp_path / FILE).write_text("<html>mine</html>")
    with pytest.raises(ValueError, match=r"report\.html is no report of moesaic's"):
        write_page(made_page(tmp_path), tmp_path / FILE)
    assert (tmp_path / FILE).read_text() == "<html>mine</html>"


def test_the_terminal_has_the_verdict_and_the_figures(tmp_path, capsys):
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
    assert points[:2] == [
        ["new: sparse", {"test top1, %": 97.2, "MFLOPs": 6.6}],
        ["new: dense", {"test top1, %": 96.1}],
    ]
    path.write_text("<html>mine</html>")
    assert write_index(runs) is None
    assert path.read_text() == "<html>mine</html>"


def test_an_empty_section_is_left_out(tmp_path):
    assert Section("Nothing", sections=(Section("Inner"),)).is_empty
    assert "Nothing" not in Html(html.render(made_page(tmp_path))).text


def test_a_page_as_markdown_has_its_texts_and_tables_and_nothing_that_is_closed():
    table = Table("", ("", "a|b"), (("x", "1"),))
    parts = (
        Text.of("one"),
        Text.of("two", "three"),
        Code("Command", "run"),
        Code("Config", "k: 1", closed=True),
        table,
    )
    inner = Section("Inner", (Text.of("deep"),))
    page = Page("T", ("First.", "Second."), sections=(Section("S", parts, (inner,)), Section("Empty")))
    assert markdown(page) == (
        "# T\n\n**First.**  \nSecond.  \n\n## S\n\none\n\n- two\n- three\n\nCommand:\n\n```\nrun\n```\n\n"
        "|  | a\\|b |\n| --- | ---: |\n| x | 1 |\n\n### Inner\n\ndeep\n"
    )
