"""The index of a folder of runs: a page that lists their reports, sorts, filters and compares them."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from pathlib import Path

from apps.base.machine import moment
from apps.base.progress import say
from apps.report.page.html import as_json, is_report, page_file, render
from apps.report.page.parts import Page, shown
from apps.report.page.writing import FILE, read_json, write_html

INDEX = "index.html"

_WORDS = ' class="words"'

FEWEST = 2
"""Reports from which a folder has an index."""


def write_index(folder: Path) -> Path | None:
    """Write or refresh ``index.html`` of a folder of runs, print its path, and return it.

    The runs are the subfolders, their subfolders, and their earlier runs that have a report. With fewer than
    ``FEWEST``, or where another ``index.html`` is there that no report has written, nothing is written and None is
    returned.
    """
    path = folder / INDEX
    pages = read_reports(folder)
    if len(pages) < FEWEST or (path.exists() and not is_report(path)):
        return None
    page = Page(f"Runs in {folder.resolve().name}", (), kind=f"index of {len(pages)} runs", date=moment())
    write_html(render(page, before=_table(pages) + _choice(pages), code=page_file("index.js")), path)
    say(f"index of {len(pages)} runs: {path}")
    return path


def read_reports(folder: Path) -> dict[str, Page]:
    """Return the reports below ``folder`` without their sections, by relative path, the newest first.

    One whose ``report.json`` is damaged or of an earlier version is named and left out.
    """
    pages = {}
    for path in sorted(path for place in ("*", "*/*", "*/earlier/*") for path in folder.glob(f"{place}/{FILE}")):
        about = path.with_suffix(".json")
        if about.is_file() and is_report(path):
            try:
                page = read_json(about)
            except ValueError as error:
                say(f"left out of the index: {error}")
                continue
            pages[path.relative_to(folder).as_posix()] = page
    return dict(sorted(pages.items(), key=lambda item: item[1].date, reverse=True))


def _choice(pages: dict[str, Page]) -> str:
    """Return a figure whose axes the reader chooses, as HTML; empty where no model has figures."""
    points = [
        (_name(path, entry.name), {name: value for name, value in entry.figures.items() if math.isfinite(value)})
        for path, page in pages.items()
        for entry in page.entries
    ]
    names = list(dict.fromkeys(name for _, figures in points for name in figures))
    if not names:
        return ""
    choices = "".join(
        f'<label>{axis} axis <select id="{own}">{_options(names, names[min(chosen, len(names) - 1)])}</select></label>'
        for axis, own, chosen in (("vertical", "up", 0), ("horizontal", "across", 1))
    )
    return (
        '<section aria-labelledby="side-by-side"><h2 id="side-by-side">Side by side</h2><figure class="panel">'
        f'<h3>Any figure against any other</h3><div class="tools">{choices}</div>'
        '<svg id="choice" role="img" aria-label="A point a model; the table above has the numbers."></svg>'
        "<figcaption>A point a model; choose what the axes show.</figcaption></figure>"
        f'<script type="application/json" id="points">{as_json(points)}</script></section>\n'
    )


def _options(names: Sequence[str], chosen: str) -> str:
    return "".join(f"<option{' selected' * (n == chosen)}>{html.escape(n)}</option>" for n in names)


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
