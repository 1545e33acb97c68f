"""The index of a folder of runs: a page that lists their reports, sorts, filters and compares them."""

from __future__ import annotations

import math
from pathlib import Path

from markupsafe import Markup

from apps.base.machine import moment
from apps.base.progress import say
from apps.base.templates import template
from apps.report.page.html import as_json, is_report, page_file, render
from apps.report.page.parts import Page, shown
from apps.report.page.writing import FILE, read_json, write_html

INDEX = "index.html"

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
    write_html(render(page, before=_before(pages), code=page_file("index.js")), path)
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


def _before(pages: dict[str, Page]) -> Markup:
    """Return the table of the runs, a row a model, and a figure whose axes the reader chooses."""
    models = [(path, page, entry) for path, page in pages.items() for entry in page.entries]
    points = [
        (_name(path, entry.name), {name: value for name, value in entry.figures.items() if math.isfinite(value)})
        for path, _, entry in models
    ]
    text = template(Path(__file__).with_name("index.html")).render(
        models=[
            (_name(path, entry.name), path, path.removesuffix(f"/{FILE}"), page, entry) for path, page, entry in models
        ],
        figures=list(dict.fromkeys(name for _, _, entry in models for name in entry.figures)),
        names=list(dict.fromkeys(name for _, figures in points for name in figures)),
        points=Markup(as_json(points)),
        shown=shown,
    )
    return Markup(text)


def _name(path: str, model: str) -> str:
    run = path.removesuffix(f"/{FILE}")
    return f"{run}: {model}" if model else run
