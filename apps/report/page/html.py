"""A page as HTML: one file that loads nothing, in light and dark, for keyboards, screen readers and telephones."""

from __future__ import annotations

import base64
import html
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from apps.report.colors import color_of, expert_colors, ink_on
from apps.report.page.charts import BarChart, Chart, HeatmapChart, LineChart, ScatterChart, thinned_rows
from apps.report.page.parts import Code, Gallery, Page, Part, Picture, Section, Table, Text, Words, shown
from apps.report.page.vega import script, vega_lite

GENERATOR = '<meta name="generator" content="moesaic">'
"""Marks a file that a page may replace."""

MOST_BYTES = 5_000_000
"""Size that a page stays below: pictures that would go beyond are named in it and left out."""

_HERE = Path(__file__).parent
_CHARTS = (ScatterChart, LineChart, BarChart, HeatmapChart)
# Nothing is loaded, whatever a text in a report says. Vega compiles expressions, which is "eval" to a browser.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline' 'unsafe-eval'"


_OF_INDEX = ("runs", "list", "search", "only", "count", "side-by-side", "points", "choice", "up", "across")
_MARK = "<!--picture-->"


@dataclass
class _Writing:
    """The state of a page that is being written.

    Attributes:
        specs: Vega-Lite specifications by the id of their place.
        pictures: pictures, in the order of their marks in the text.
        ids: ids given so far.
    """

    specs: dict[str, Any] = field(default_factory=dict)
    pictures: list[Picture] = field(default_factory=list)
    ids: set[str] = field(default_factory=lambda: {"report", "verdict", "charts", *_OF_INDEX})

    def id(self, title: str) -> str:
        """Return an id that the page has not had, made of a title."""
        words = "".join(c if c.isascii() and c.isalnum() else "-" for c in title.lower())
        stem = "-".join(filter(None, words.split("-"))) or "part"
        stem = f"s-{stem}" if stem[0].isdigit() else stem
        name, number = stem, 2
        while name in self.ids:
            name, number = f"{stem}-{number}", number + 1
        self.ids.add(name)
        return name


def is_report(path: Path) -> bool:
    """Return whether a file is a page that ``render`` made."""
    with open(path, encoding="utf-8", errors="replace") as file:
        return GENERATOR in file.read(2000)


def render(page: Page, before: str = "", code: str = "") -> str:
    """Return a page as HTML.

    Args:
        page: the page.
        before: HTML that stands before its sections.
        code: JavaScript that runs after the page's own.
    """
    writing = _Writing()
    sections = [s for s in page.sections if not s.is_empty]
    ids = [writing.id(section.title) for section in sections]
    body = [_section(section, writing, 2, own) for section, own in zip(sections, ids, strict=True)]
    links = "".join(f'<li><a href="#{own}">{_text(s.title)}</a></li>' for s, own in zip(sections, ids, strict=True))
    about = " · ".join(_text(word) for word in (page.kind, page.date.replace("T", " ")) if word)
    first, *rest = page.verdict or ("",)
    verdict = "".join(
        [
            f'<p class="verdict">{_text(first)}</p>' if first else "",
            _lines(rest),
            "" if page.figures is None else _table(page.figures),
        ]
    )
    text = "".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n',
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n',
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n',
            f'<meta name="color-scheme" content="light dark">\n{GENERATOR}\n',
            f"<title>{_text(page.title)}</title>\n<style>\n{page_file('page.css')}</style>\n</head>\n<body>\n",
            '<a class="skip" href="#report">Skip to the report</a>\n',
            f'<header><p class="about">{about}</p><h1>{_text(page.title)}</h1></header>\n',
            f'<nav aria-label="Sections"><ul>{links}</ul></nav>\n' if links else "",
            '<main id="report">\n',
            f'<section aria-labelledby="verdict"><h2 id="verdict">Verdict</h2>{verdict}</section>\n' if verdict else "",
            before,
            *body,
            "</main>\n<footer><p>Written by moesaic. The file has all that it shows and loads nothing.</p></footer>\n",
            f"<script>{_inside_script(script())}</script>\n" if writing.specs else "",
            f'<script type="application/json" id="charts">{as_json(writing.specs)}</script>\n',
            f"<script>\n{page_file('page.js')}</script>\n",
            f"<script>\n{code}</script>\n" if code else "",
            "</body>\n</html>\n",
        ]
    )
    return _with_pictures(text, writing.pictures)


def _with_pictures(text: str, pictures: Sequence[Picture]) -> str:
    """Return a page with its pictures in the place of their marks, as far as it stays below ``MOST_BYTES``."""
    room = MOST_BYTES - len(text.encode())
    before, *rest = text.split(_MARK)
    whole = [before]
    for picture, after in zip(pictures, rest, strict=True):
        shown = _picture(picture)
        if len(shown) > room:
            name = Path(picture.path).name
            shown = f"<p>{_text(picture.alt)}: {_text(name)} is left out, to keep this file below 5 MB.</p>"
        room -= len(shown)
        whole += [shown, after]
    return "".join(whole)


def _section(section: Section, writing: _Writing, level: int, own: str) -> str:
    heading = f"h{min(level, 6)}"
    parts = "".join(_runs(section.parts, writing, level + 1))
    below = "".join(_section(s, writing, level + 1, writing.id(s.title)) for s in section.sections if not s.is_empty)
    return (
        f'<section aria-labelledby="{own}"><{heading} id="{own}">{_text(section.title)}</{heading}>{parts}{below}'
        "</section>\n"
    )


def _runs(parts: Sequence[Part], writing: _Writing, level: int) -> Iterator[str]:
    """Yield the parts, charts that follow each other side by side where there is room."""
    for are_charts, run in itertools.groupby(parts, lambda part: isinstance(part, _CHARTS)):
        if are_charts:
            charts = "".join(_chart(part, writing, level) for part in run)  # type: ignore[arg-type]
            yield f'<div class="charts">{charts}</div>'
        else:
            yield from (_part(part, writing) for part in run)


def _part(part: Part, writing: _Writing) -> str:
    if isinstance(part, Text):
        return f"<p>{_text(part.lines[0])}</p>" if len(part.lines) == 1 else _lines(part.lines)
    if isinstance(part, Table):
        return _table(part)
    if isinstance(part, Code):
        label = html.escape(part.title, quote=True)
        code = f'<pre tabindex="0" role="group" aria-label="{label}"><code>{_text(part.text)}</code></pre>'
        if part.closed:
            return f"<details><summary>{_text(part.title)}</summary>{code}</details>"
        return f'<p class="label">{_text(part.title)}</p>{code}'
    if isinstance(part, Words):
        return _words(part, writing)
    if isinstance(part, Gallery):
        return _gallery(part, writing)
    assert isinstance(part, Picture), part
    writing.pictures.append(part)
    return _MARK


def _lines(lines: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{_text(line)}</li>' for line in lines)}</ul>" if lines else ""


def _table(table: Table) -> str:
    headings = []
    words = [any(not _is_number(cell) for cell in column) for column in zip(*table.rows, strict=True)]
    for column, is_words in zip(table.columns, words or [False] * len(table.columns), strict=True):
        inside = _text(column) if column else '<span class="hidden">name</span>'
        if table.sortable:
            inside = f'<button type="button" class="sort">{inside}</button>'
        headings.append(f'<th scope="col"{_WORDS if is_words else ""}>{inside}</th>')
    rows = "".join(
        f'<tr><th scope="row">{_text(row[0])}</th>'
        + "".join(
            f"<td{_WORDS if is_words else ''}>{_text(cell)}</td>"
            for cell, is_words in zip(row[1:], words[1:], strict=True)
        )
        + "</tr>"
        for row in table.rows
    )
    label = html.escape(table.title or "table", quote=True)
    caption = f"<caption>{_text(table.title)}</caption>" if table.title else ""
    kind = ' class="sortable"' if table.sortable else ""
    note = f'<p class="note">{_text(table.note)}</p>' if table.note else ""
    return (
        f'<div class="wide" tabindex="0" role="group" aria-label="{label}"><table{kind}>{caption}'
        f"<thead><tr>{''.join(headings)}</tr></thead><tbody>{rows}</tbody></table></div>{note}"
    )


_WORDS = ' class="words"'


def _is_number(cell: str) -> bool:
    """Return whether a cell stands to the right, as numbers do, with what may follow one; so does an empty one."""
    return not cell or cell[0].isdigit() or (cell[0] in "+-−–<" and not cell[1:2].isalpha())


def _chart(chart: Chart, writing: _Writing, level: int) -> str:
    own = writing.id(f"chart {chart.title}")
    heading = f"h{min(level, 6)}"
    rows = chart.cells()
    kept = thinned_rows(rows)
    note = f"{len(kept)} of {len(rows)} rows, at equal steps." if len(kept) < len(rows) else ""
    table = _table(Table(f"Numbers: {chart.title}", chart.headings(), tuple(kept), note=note))
    writing.specs[own] = vega_lite(chart)
    wide = " broad" if isinstance(chart, HeatmapChart) and len(chart.columns) > 16 else ""
    return (
        f'<figure class="panel{wide}"><{heading}>{_text(chart.title)}</{heading}><div class="chart" id="{own}"></div>'
        f"<figcaption>{_text(chart.summary)}</figcaption>"
        f'<details><summary>Numbers<span class="hidden"> of {_text(chart.title)}</span></summary>{table}'
        "</details></figure>"
    )


def _words(words: Words, writing: _Writing) -> str:
    own, colors = writing.id(words.title), expert_colors(words.num_colors)
    joined = words.joined or (False,) * len(words.words)
    largest = {name: max((v for v in row if v > 0), default=1.0) for name, row in words.values.items()}
    items = []
    for i, word in enumerate(words.words):
        marks = [_mark(name, row[i] or "–", _color(row[i], colors)) for name, row in words.labels.items()]
        for name, row in words.values.items():
            share = 0 if math.isnan(row[i]) else round(40 * max(row[i], 0.0) / largest[name])
            shade = f"background:color-mix(in srgb,var(--link) {share}%,transparent)"
            marks.append(_mark(name, shown(row[i], 2), shade))
        kind = ' class="joined"' if joined[i] else ""
        items.append(f'<li{kind}><span dir="auto">{_text(word)}</span>{"".join(marks)}</li>')
    rows = ", ".join((*words.labels, *words.values))
    note = " ".join(filter(None, (f"Below each word: {rows}." if rows else "", words.note)))
    return (
        f'<figure class="panel tokens"><p class="label" id="{own}">{_text(words.title)}</p>'
        f'<ol role="list" aria-labelledby="{own}">{"".join(items)}</ol><figcaption>{_text(note)}</figcaption></figure>'
    )


def _gallery(gallery: Gallery, writing: _Writing) -> str:
    own = writing.id(gallery.title)
    items = []
    for picture in gallery.pictures:
        width, height = picture.size
        source, alt = html.escape(picture.source, quote=True), html.escape(picture.alt, quote=True)
        image = f'<img src="{source}" alt="{alt}" width="{width}" height="{height}">'
        if picture.link:
            image = f'<a href="{html.escape(picture.link, quote=True)}">{image}</a>'
        items.append(f"<li>{image}{''.join(f'<span>{_text(line)}</span>' for line in picture.lines)}</li>")
    note = f"<figcaption>{_text(gallery.note)}</figcaption>" if gallery.note else ""
    return (
        f'<figure class="panel gallery"><p class="label" id="{own}">{_text(gallery.title)}</p>'
        f'<ol role="list" aria-labelledby="{own}">{"".join(items)}</ol>{note}</figure>'
    )


def _mark(name: str, text: str, style: str) -> str:
    style = f' style="{style}"' if style else ""
    return f'<span class="mark"{style}><span class="hidden">{_text(name)}: </span>{_text(text)}</span>'


def _color(label: str, colors: Sequence[str]) -> str:
    """Return the style of a label that begins with a number."""
    color = color_of(label, colors)
    return "" if color is None else f"background:{color};color:{ink_on(color)}"


def _picture(picture: Picture) -> str:
    path = Path(picture.path)
    if not path.is_file():
        return f"<p>{_text(picture.alt)}: {_text(path.name)} is not there any more.</p>"
    data = base64.b64encode(path.read_bytes()).decode()
    alt = html.escape(picture.alt, quote=True)
    caption = f"<figcaption>{_text(picture.caption)}</figcaption>" if picture.caption else ""
    return f'<figure class="picture"><img src="data:image/png;base64,{data}" alt="{alt}">{caption}</figure>'


def _text(text: str) -> str:
    return html.escape(text, quote=False)


def as_json(value: Any) -> str:
    """Return JSON that may stand inside a script element."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _inside_script(code: str) -> str:
    """Return JavaScript that does not end the element it stands in."""
    return code.replace("</script", "<\\/script").replace("<!--", "<\\!--")


def page_file(name: str) -> str:
    """Return the text of a file beside this module."""
    return (_HERE / name).read_text(encoding="utf-8")
