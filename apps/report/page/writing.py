"""Pages as files, on the terminal and in the browser; sections that one command keeps for another."""

from __future__ import annotations

import dataclasses
import json
import webbrowser
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from apps.base.files import replacing
from apps.base.progress import say
from apps.report.page.html import is_report, render
from apps.report.page.parts import Code, Page, Part, Section, Table, Text
from apps.report.page.saved import from_json, to_json
from apps.report.tables import markdown_table, print_in_parts

FILE = "report.html"
"""The name of a report in the folder of its run; ``report.json`` beside it is read by the index of runs."""

SECTIONS = "sections.json"
"""The name of the file of ``save_sections``."""


def write_page(page: Page, path: Path) -> Path:
    """Write ``page`` as one HTML file, whole or not at all, and print its path.

    The file beside it that ends in ``.json`` has the page without its sections, for the index of runs.

    Raises:
        ValueError: a file is there that no report has written.
    """
    write_html(render(page), path)
    with replacing(path.with_suffix(".json")) as file:
        json.dump(to_json(dataclasses.replace(page, sections=())), file, indent=1)
    say(f"report: {path}")
    return path


def write_html(text: str, path: Path) -> None:
    """Write a page that ``render`` made, or raise a ValueError where a file is there that it did not make."""
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
    """Return the texts and tables of a page as Markdown, without charts, pictures and what it shows closed."""
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
    """Write sections as JSON into ``folder``, where their pictures are; ``load_sections`` reads them."""
    path = folder / SECTIONS
    with replacing(path) as file:
        json.dump(to_json(tuple(sections)), file)
    return path


def load_sections(folder: Path) -> tuple[Section, ...]:
    """Return the sections that ``save_sections`` wrote, their pictures by full paths; none where there are none."""
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
