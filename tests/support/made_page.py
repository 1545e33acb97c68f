"""A page with one part of every kind, and a reader of its HTML."""

from __future__ import annotations

import base64
from html.parser import HTMLParser
from pathlib import Path

from apps.report.page import (
    BarChart,
    Code,
    Entry,
    HeatmapChart,
    Line,
    LineChart,
    Page,
    Picture,
    Point,
    ScatterChart,
    Section,
    Table,
    Text,
    Words,
)

# A PNG of one black point.
PNG = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg==")
_EMPTY = ("meta", "img", "input", "br")
MARKS = {"chart-cost": 6, "chart-curve": 2, "chart-load": 3, "chart-classes": 4}
"""The marks of each chart that are drawn at least: points and bars, lines, bars, cells."""


def made_page(folder: Path, title: str = "Sparse & dense") -> Page:
    """Return a page whose picture is written into ``folder``."""
    (folder / "point.png").write_bytes(PNG)
    points = tuple(
        Point(name, x, y, y - 1, y + 1)
        for name, x, y in (("sparse", 6.6, 97.2), ("dense", 6.5, 96.1), ("<b>", 21.0, 97.0))
    )
    lines = tuple(Line(name, (0.0, 10.0, 20.0), (10.0, 50.0, 90.0), "seed 0") for name in ("sparse", "dense"))
    curve = LineChart("Curve", "It rises.", "step", "top1, %", lines)
    load = BarChart(
        "Load", "Nearly even.", "expert", "share, %", ("0", "1", "2"), {"block 1": (30.0, 30.0, 40.0)}, line=33.3
    )
    values = ((90.0, 10.0), (20.0, 80.0))
    classes = HeatmapChart("Classes", "Mostly right.", "class", "expert", ("cat", "dog"), ("0", "1"), values)
    experts = {"block 1": [[0, 1], [1, 0], [2, 3]], "block 2": [[2, 3], [3, 3], [0, 3]]}
    words = Words.of_pieces("A sentence", ["<s>", "\u2581read", "ing"], experts, 3, {"loss": [0.5, 2.0, float("nan")]})
    return Page(
        title,
        ("Sparse wins: +1.1 points, 95 % interval +0.4 to +1.8.", "Against the larger one no difference is shown."),
        Table("", ("", "sparse", "dense"), (("test top1, %", "97.2 ± 0.4", "96.1 ± 0.5"),)),
        (
            Section("Quality", (ScatterChart("Cost", "Sparse is best.", "MFLOPs", "top1, %", points),)),
            Section("Training", (Text.of("One", "two"), curve)),
            Section("Experts", (load, classes, Picture("point.png", "a black point", "A point."), words)),
            Section("Nothing"),
            Section("Below", sections=(Section("Inner", (Code("Command", "moesaic <test>", closed=True),)),)),
            Section("Sorted", (Table("Experts", ("expert", "share, %"), (("b", "9"), ("a", "10")), sortable=True),)),
        ),
        kind="comparison",
        date="2026-11-27T09:00:00+00:00",
        entries=(Entry("sparse", {"test top1, %": 97.2, "MFLOPs": 6.6}), Entry("dense", {"test top1, %": 96.1})),
    )


class Html(HTMLParser):
    """Reads HTML: raises a ValueError for a tag that is not closed in order.

    Attributes:
        text: all text outside scripts and styles.
        tags: (name, attributes) of every element.
        headings: levels of the headings, in order.
    """

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.headings: list[int] = []
        self.text = ""
        self.feed(source)
        self.close()
        if self.open:
            raise ValueError(f"never closed: {self.open}")

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in _EMPTY:
            self.open.append(tag)
        if tag[0] == "h" and tag[1:].isdigit():
            self.headings.append(int(tag[1:]))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open[-1] != tag:
            raise ValueError(f"</{tag}> closes {self.open[-1:]}")
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("script", "style"):
            self.text += f"{data}\n"

    def attributes(self, name: str) -> list[str]:
        """Return the values of an attribute, of all elements."""
        return [value for _, attrs in self.tags for key, value in attrs.items() if key == name and value is not None]
