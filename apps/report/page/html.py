"""A page as HTML: one file that loads nothing, in light and dark, for keyboards, screen readers and telephones."""

from __future__ import annotations

import base64
import contextlib
import functools
import io
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

from markupsafe import Markup

from apps.base.files import replacing
from apps.base.templates import template
from apps.data.cache import cache_root
from apps.report.colors import color_of, expert_colors, ink_on
from apps.report.page.charts import BarChart, Chart, HeatmapChart, LineChart, ScatterChart, thinned_rows
from apps.report.page.parts import Page, Picture, Table, Words, shown

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


_ADDRESSES = 72 * 2**30
"""Bytes of address space without which V8 aborts the process; it uses few of them."""


def check_addresses(otherwise: str = "") -> None:
    """Raise a RuntimeError, which ends with ``otherwise``, if this process may not have what drawing needs."""
    with contextlib.suppress(ImportError):  # Windows has none
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        if 0 <= limit < _ADDRESSES:
            raise RuntimeError(
                f"charts need {_ADDRESSES >> 30} GiB of address space, hardly any memory, and this process may have "
                f"{limit / 2**30:.1f} GiB: ulimit -v unlimited{otherwise}"
            )


def _vega() -> ModuleType:
    """Return vl-convert, or raise the error of ``check_addresses``."""
    check_addresses()
    import vl_convert

    return vl_convert


@functools.cache
def script() -> str:
    """Return the JavaScript of Vega, Vega-Lite and Vega-Embed, as ``window.vegaEmbed``: 0.9 MB.

    Making it takes about 2 s, so the user's cache keeps it for each version of vl-convert.
    """
    kept = cache_root(None) / "charts" / f"vega-{version('vl-convert-python')}.js"
    if kept.is_file():
        return kept.read_text(encoding="utf-8")
    text = str(_vega().javascript_bundle("window.vegaEmbed = vegaEmbed;"))
    with contextlib.suppress(OSError), replacing(kept) as file:  # if the cache cannot be written, it is made again
        file.write(text)
    return text


def save_charts(charts: Sequence[Chart | Words], path: Path, title: str) -> Path:
    """Write charts as one PNG file, whole or not at all, and make its folder; return the path."""
    with replacing(path, "wb") as file:
        file.write(png_of(charts, title))
    return path


def png_of(charts: Sequence[Chart | Words], title: str) -> bytes:
    """Return charts as a PNG file, side by side as far as there is room; maps on one scale of color."""
    from PIL import Image

    from apps.report.page.vega import still

    drawn, small = Image.open(io.BytesIO(_vega().vegalite_to_png(still(charts, title), scale=2.0))), io.BytesIO()
    drawn.convert("RGB").save(small, "PNG", optimize=True)  # a third of the size
    return small.getvalue()


def is_report(path: Path) -> bool:
    """Return whether a file is a page that ``render`` made."""
    with open(path, encoding="utf-8", errors="replace") as file:
        return GENERATOR in file.read(2000)


def render(page: Page, before: Markup | str = "", code: str = "") -> str:
    """Return a page as HTML.

    Args:
        page: the page.
        before: HTML before its sections.
        code: JavaScript that runs after the page's own.
    """
    written = _Written(code)
    sections = [section for section in page.sections if not section.is_empty]

    text = template(_HERE / "page.html").render(
        page=page,
        before=Markup(before),
        sections=[(section, written.id(section.title)) for section in sections],
        policy=_POLICY,
        generator=Markup(GENERATOR),
        css=Markup(page_file("page.css")),
        wordy=_wordy,
        marked=_marked,
        numbers=_numbers,
        runs=lambda parts: [
            (own, list(run)) for own, run in itertools.groupby(parts, lambda part: isinstance(part, _CHARTS))
        ],
        id=written.id,
        draw=written.draw,
        picture=written.picture,
        scripts=written.scripts,
    )
    return written.with_pictures(text)


@dataclass
class _Written:
    """The contents of a finished page.

    Attributes:
        code: JavaScript that runs after the page's own.
        specs: Vega-Lite specifications by the id of their place.
        pictures: pictures, in the order of their marks in the text.
        ids: ids given so far.
    """

    code: str
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

    def draw(self, chart: Chart) -> str:
        """Keep a chart, and return the id of its place."""
        place = self.id(f"chart {chart.title}")
        from apps.report.page.vega import vega_lite

        self.specs[place] = vega_lite(chart)
        return place

    def picture(self, part: Picture) -> Markup:
        """Return a mark in the place of a picture, since its size must be known first."""
        self.pictures.append(part)
        return Markup(_MARK)

    def scripts(self) -> Markup:
        """Return the page's JavaScript, with the charts rendered so far."""
        inside = script().replace("</script", "<\\/script").replace("<!--", "<\\!--") if self.specs else ""
        library = f"<script>{inside}</script>\n" if inside else ""
        charts = f'<script type="application/json" id="charts">{as_json(self.specs)}</script>\n'
        own = "".join(f"<script>\n{code}</script>\n" for code in (page_file("page.js"), self.code) if code)
        return Markup(library + charts + own)

    def with_pictures(self, text: str) -> str:
        """Return a page with its pictures in the place of their marks, as far as it stays below ``MOST_BYTES``."""
        room = MOST_BYTES - len(text.encode())
        before, *rest = text.split(_MARK)
        whole = [before]
        for picture, after in zip(self.pictures, rest, strict=True):
            shown = _picture(picture)
            if len(shown) > room:
                left_out = "{}: {} is left out, to keep this file below 5 MB."
                shown = Markup(f"<p>{left_out}</p>").format(picture.alt, Path(picture.path).name)
            room -= len(shown)
            whole += [shown, after]
        return "".join(whole)


def _is_chart(part: Any) -> bool:
    return isinstance(part, _CHARTS)


def _numbers(chart: Chart) -> Table:
    """Return the table of a chart's numbers."""
    rows = chart.cells()
    kept = thinned_rows(rows)
    note = f"{len(kept)} of {len(rows)} rows, at equal steps." if len(kept) < len(rows) else ""
    return Table(f"Numbers: {chart.title}", chart.headings(), tuple(kept), note=note)


def _wordy(table: Table) -> list[Markup]:
    """Return the class of each column: one for words, or none for numbers, which are right-aligned."""
    columns = list(zip(*table.rows, strict=True)) or [()] * len(table.columns)
    return [Markup(' class="words"' * any(not _is_number(cell) for cell in column)) for column in columns]


def _is_number(cell: str) -> bool:
    """Return whether a cell is right-aligned, as numbers are, with what may follow one; so does an empty one."""
    return not cell or cell[0].isdigit() or (cell[0] in "+-−–<" and not cell[1:2].isalpha())


def _marked(words: Words) -> Iterator[tuple[str, bool, list[tuple[str, str, str]]]]:
    """Yield each word, whether it belongs to the one before, and its marks: name, text and style."""
    colors = expert_colors(words.num_colors)
    joined = words.joined or (False,) * len(words.words)
    largest = {name: max((v for v in row if v > 0), default=1.0) for name, row in words.values.items()}
    for i, word in enumerate(words.words):
        marks = [(name, row[i] or "–", _color(row[i], colors)) for name, row in words.labels.items()]
        for name, row in words.values.items():
            share = 0 if math.isnan(row[i]) else round(40 * max(row[i], 0.0) / largest[name])
            shade = f"background:color-mix(in srgb,var(--link) {share}%,transparent)"
            marks.append((name, shown(row[i], 2), shade))
        yield word, joined[i], marks


def _color(label: str, colors: Sequence[str]) -> str:
    """Return the style of a label that starts with a number."""
    color = color_of(label, colors)
    return "" if color is None else f"background:{color};color:{ink_on(color)}"


def _picture(picture: Picture) -> Markup:
    path = Path(picture.path)
    if not path.is_file():
        return Markup("<p>{}: {} is not there any more.</p>").format(picture.alt, path.name)
    data = base64.b64encode(path.read_bytes()).decode()
    caption = Markup("<figcaption>{}</figcaption>").format(picture.caption) if picture.caption else ""
    image = Markup('<img src="data:image/png;base64,{}" alt="{}">').format(data, picture.alt)
    return Markup('<figure class="picture">{}{}</figure>').format(image, caption)


def as_json(value: Any) -> str:
    """Return JSON that is safe inside a script element."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def page_file(name: str) -> str:
    """Return the text of a file next to this module."""
    return (_HERE / name).read_text(encoding="utf-8")
