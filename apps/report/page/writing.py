"""Pages as files, on the terminal and in the browser; sections that one command keeps for another."""

from __future__ import annotations

import dataclasses
import json
import math
import webbrowser
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from apps.base.files import replacing
from apps.base.machine import moment
from apps.base.progress import say
from apps.base.templates import template
from apps.report.page import charts, parts
from apps.report.page.html import as_json, is_report, page_file, render
from apps.report.page.parts import Code, Page, Part, Section, Table, Text, shown
from apps.report.tables import markdown_table, print_in_parts

_CLASSES: dict[str, type] = {
    kind.__name__: kind
    for module in (charts, parts)
    for kind in vars(module).values()
    if isinstance(kind, type) and dataclasses.is_dataclass(kind) and kind.__module__ == module.__name__
}
_NAME = "class"


def to_json(value: Any) -> Any:
    """Return a part, or a sequence of parts, as dicts, lists, numbers and texts; a dict names its class."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {_NAME: type(value).__name__, **fields}
    if isinstance(value, dict):
        return {name: to_json(item) for name, item in value.items()}
    if isinstance(value, np.generic):
        return value.item()
    return [to_json(item) for item in value] if isinstance(value, (list, tuple)) else value


def from_json(value: Any) -> Any:
    """Return what ``to_json`` made a value of; sequences are tuples.

    Raises:
        ValueError: a class that is not a part of a page, or fields that it does not have.
    """
    if isinstance(value, dict):
        fields = {name: from_json(item) for name, item in value.items()}
        if not isinstance(fields.get(_NAME), str):  # a task may be called so
            return fields
        name = fields.pop(_NAME)
        if name not in _CLASSES:
            raise ValueError(f"{name!r} is no part of a page")
        try:
            return _CLASSES[name](**fields)
        except TypeError as error:
            raise ValueError(f"{name}: {error}") from None
    return tuple(map(from_json, value)) if isinstance(value, list) else value


FILE = "report.html"
"""The name of a report in the folder of its run; ``report.json`` beside it is read by the index of runs."""

SECTIONS = "sections.json"
"""The name of the file of ``save_sections``."""


def write_page(page: Page, path: Path) -> Path:
    """Write ``page`` as one HTML file, whole or not at all, and print its path.

    The file next to it that ends in ``.json`` has the page without its sections, for the index of runs.

    Raises:
        ValueError: a file is there that no report has written.
    """
    write_html(render(page), path)
    with replacing(path.with_suffix(".json")) as file:
        json.dump(to_json(dataclasses.replace(page, sections=())), file, indent=1)
    say(f"report: {path}")
    return path


def write_html(text: str, path: Path) -> None:
    """Write a page that ``render`` made, or raise a ValueError if a file is there that it did not make."""
    if path.exists() and not is_report(path):
        raise ValueError(f"{path} is no report of moesaic's: it stays as it is; move it, or choose another folder")
    with replacing(path) as file:
        file.write(text)


def show_page(page: Page) -> None:
    """Print the verdict and the figures of a page."""
    from rich.console import Console
    from rich.markup import escape

    for number, line in enumerate(page.verdict):
        text = escape(line)
        Console().print(text if number else f"[bold]{text}[/bold]", highlight=False)
    if page.figures is not None:
        print_in_parts(page.figures.columns, page.figures.rows, empty="–", title=page.figures.title)


def markdown(page: Page) -> str:
    """Return the texts and tables of a page as Markdown, without charts, pictures and collapsed parts."""
    verdict = [f"{line}  " if number else f"**{line}**  " for number, line in enumerate(page.verdict)]
    sections = [line for section in page.sections for line in _section(section, 2)]
    return "\n".join([f"# {page.title}", "", *verdict, *_written(page.figures), *sections]) + "\n"


def _section(section: Section, level: int) -> list[str]:
    lines = [line for part in section.parts for line in _written(part)]
    lines += [line for own in section.sections for line in _section(own, level + 1)]
    return ["", f"{'#' * level} {section.title}", *lines] if lines else []


def _written(part: Part | None) -> list[str]:
    """Return the lines of a part in Markdown."""
    if isinstance(part, Text):
        return ["", *(part.lines if len(part.lines) == 1 else (f"- {line}" for line in part.lines))]
    if isinstance(part, Code) and not part.closed:
        return ["", f"{part.title}:", "", "```", part.text.rstrip(), "```"]
    if isinstance(part, Table):
        title, note = (["", text] if text else [] for text in (part.title, part.note))
        return [*title, "", *markdown_table(part.columns, part.rows), *note]
    return []


def open_page(path: Path) -> None:
    """Show a page in the user's browser; without one nothing happens, since its path has been printed."""
    webbrowser.open(path.resolve().as_uri())


def save_sections(sections: Sequence[Section], folder: Path) -> Path:
    """Write sections as JSON into ``folder``, which has their pictures; ``load_sections`` reads them."""
    path = folder / SECTIONS
    with replacing(path) as file:
        json.dump(to_json(tuple(sections)), file)
    return path


def load_sections(folder: Path) -> tuple[Section, ...]:
    """Return the sections that ``save_sections`` wrote, their pictures by full paths; none if there are none."""
    path = folder / SECTIONS
    if not path.is_file():
        return ()
    sections: tuple[Section, ...] = read_json(path, tuple)
    return tuple(section.below(folder) for section in sections)


def read_json(path: Path, kind: type = Page) -> Any:
    """Return the page or the tuple of sections in a file, or raise a ValueError that names it."""
    try:
        value = from_json(json.loads(path.read_text(encoding="utf-8")))
        if not isinstance(value, kind):
            raise ValueError(f"no {kind.__name__}")
    except ValueError as error:
        raise ValueError(f"{path} holds no part of a report ({error}): delete it, and test again") from None
    return value


INDEX = "index.html"

FEWEST = 2
"""Reports from which a folder has an index."""


def write_index(folder: Path) -> Path | None:
    """Write or refresh ``index.html`` of a folder of runs, print its path, and return it.

    The runs are the subfolders, their subfolders, and their earlier runs that have a report. With fewer than
    ``FEWEST``, or if another ``index.html`` is there that no report has written, nothing is written and None is
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
    """Return the table of the runs, one row per model, and a figure whose axes the reader chooses."""
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
