"""The index of a folder of runs: a page that lists their reports, sorts, filters and compares them."""

from __future__ import annotations

import html
from pathlib import Path

from apps.base.machine import moment
from apps.report.page.charts import ChoiceChart, ChoicePoint
from apps.report.page.html import is_report, render
from apps.report.page.parts import Page, Section, shown
from apps.report.page.writing import FILE, read_json, write_html

INDEX = "index.html"

_WORDS = ' class="words"'

FEWEST = 2
"""Reports from which a folder has an index."""


def write_index(folder: Path) -> Path | None:
    """Write or refresh ``index.html`` of a folder of runs, print its path, and return it.

    The runs are those subfolders, or subfolders of these, that have a report. With fewer than ``FEWEST``, or where
    another ``index.html`` is there that no report has written, nothing is written and None is returned.
    """
    path = folder / INDEX
    pages = read_reports(folder)
    if len(pages) < FEWEST or (path.exists() and not is_report(path)):
        return None
    write_html(render(_page(folder, pages), before=_table(pages)), path)
    print(f"index of {len(pages)} runs: {path}")
    return path


def read_reports(folder: Path) -> dict[str, Page]:
    """Return the reports below ``folder`` without their sections, by relative path, the newest first.

    One whose ``report.json`` is damaged or of an earlier version is named and left out.
    """
    pages = {}
    for path in sorted((*folder.glob(f"*/{FILE}"), *folder.glob(f"*/*/{FILE}"))):
        about = path.with_suffix(".json")
        if about.is_file() and is_report(path):
            try:
                page = read_json(about)
            except ValueError as error:
                print(f"left out of the index: {error}")
                continue
            pages[path.relative_to(folder).as_posix()] = page
    return dict(sorted(pages.items(), key=lambda item: item[1].date, reverse=True))


def _page(folder: Path, pages: dict[str, Page]) -> Page:
    points = tuple(
        ChoicePoint(_name(path, entry.name), entry.figures)
        for path, page in pages.items()
        for entry in page.entries
        if entry.figures
    )
    title = f"Runs in {folder.resolve().name}"
    chart = ChoiceChart("Any figure against any other", "A point a model; choose what the axes show.", points)
    sections = (Section("Side by side", (chart,)),) if chart.names() else ()
    return Page(title, (), sections=sections, kind=f"index of {len(pages)} runs", date=moment())


def _name(path: str, model: str) -> str:
    run = path.removesuffix(f"/{FILE}")
    return f"{run}: {model}" if model else run


def _table(pages: dict[str, Page]) -> str:
    """Return the table as HTML: a row a model, with a box to choose it and a link to its report."""
    names = list(dict.fromkeys(name for page in pages.values() for entry in page.entries for name in entry.figures))
    headings = [*((word, _WORDS) for word in ("run", "kind", "date", "model")), *((name, "") for name in names)]
    head = "".join(
        f'<th scope="col"{kind}><button type="button" class="sort">{html.escape(heading)}</button></th>'
        for heading, kind in headings
    )
    rows = []
    for path, page in pages.items():
        for entry in page.entries or ():
            name = html.escape(_name(path, entry.name), quote=True)
            link = f'<a href="{html.escape(path, quote=True)}" title="{html.escape(page.title, quote=True)}">'
            cells = [page.kind, page.date[:16].replace("T", " "), entry.name]
            cells = [f'<td class="words">{html.escape(cell)}</td>' for cell in cells]
            cells += [f"<td>{shown(entry.figures.get(figure), 5)}</td>" for figure in names]
            box = f'<td><input type="checkbox" class="choice" aria-label="choose {name}"></td>'
            run = html.escape(path.removesuffix(f"/{FILE}"))
            rows.append(f'<tr>{box}<th scope="row">{link}{run}</a></th>{"".join(cells)}</tr>')
    return (
        '<section aria-labelledby="runs"><h2 id="runs">Runs</h2><div class="tools">'
        '<label>Search <input type="search" id="search"></label>'
        '<label><input type="checkbox" id="only"> only those chosen</label>'
        '<span id="count" role="status"></span></div>'
        '<div class="wide" tabindex="0" role="group" aria-label="Runs"><table class="sortable" id="list"><thead><tr>'
        f'<th scope="col"><span class="hidden">chosen</span></th>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div></section>\n"
    )
