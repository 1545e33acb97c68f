"""Parts of a page: sections with texts, tables, code, pictures and labeled words. Charts are in ``charts``."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from apps.base.machine import machine_facts
from apps.report.page.charts import BarChart, HeatmapChart, LineChart, ScatterChart


@dataclass(frozen=True)
class Text:
    """A paragraph, or a list of short ones.

    Attributes:
        lines: plain sentences; several are shown as a list.
    """

    lines: tuple[str, ...]

    @classmethod
    def of(cls, *lines: str) -> Text:
        return cls(lines)

    @classmethod
    def if_any(cls, lines: Iterable[str]) -> tuple[Text, ...]:
        """Return one part with the lines that are not empty, or no part if there are none."""
        shown = tuple(filter(None, lines))
        return (cls(shown),) if shown else ()


@dataclass(frozen=True)
class Table:
    """A table of texts, whose first column names the rows.

    Attributes:
        title: its caption.
        columns: headings, at least one.
        rows: cells, as many a row as there are columns.
        sortable: the reader may sort by a click on a heading.
        note: sentence below the table.

    Raises:
        ValueError: a row of another length than the headings.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    sortable: bool = False
    note: str = ""

    def __post_init__(self) -> None:
        for number, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise ValueError(f"row {number} has {len(row)} cells for {len(self.columns)} columns: {row}")


@dataclass(frozen=True)
class Code:
    """A text that is shown as it is, such as a command or a configuration.

    Attributes:
        title: its title.
        text: the text.
        closed: show it only when the reader opens it, as a long one should be.
    """

    title: str
    text: str
    closed: bool = False


@dataclass(frozen=True)
class Picture:
    """A PNG file that the page carries inside.

    Attributes:
        path: the file.
        alt: its content in words, for readers who cannot see it.
        caption: line below it.
    """

    path: str
    alt: str
    caption: str = ""


@dataclass(frozen=True)
class Thumbnail:
    """A small picture in a ``Gallery``.

    Attributes:
        source: its content as a ``data:`` URI.
        size: width and height in pixels.
        alt: its content in words, for readers who cannot see it.
        lines: lines below it.
        link: target of a click, such as the path of the whole picture from the page; "": nowhere.
    """

    source: str
    size: tuple[int, int]
    alt: str
    lines: tuple[str, ...] = ()
    link: str = ""


@dataclass(frozen=True)
class Gallery:
    """Small pictures in their order, as many side by side as there is room for.

    Attributes:
        title: their title.
        pictures: the pictures.
        note: sentence below.
    """

    title: str
    pictures: tuple[Thumbnail, ...]
    note: str = ""


START = "\u2581"
"""What sentencepiece writes before a piece that begins a word."""


@dataclass(frozen=True)
class Words:
    """Words in their order, as text, each above its labels and numbers, such as its experts and its loss.

    Attributes:
        title: their title.
        words: the words, or parts of them.
        labels: a label for each word, by the kind of label, such as "block 1": a label that starts with a number has
            the color of that number; "" is none.
        num_colors: how many numbers have a color, such as the number of experts.
        values: a number for each word, by its name: the larger the darker. NaN is none.
        joined: whether a word belongs to the one before; empty where none does.
        note: sentence below.

    Raises:
        ValueError: labels, values or ``joined`` of another length than the words.
    """

    title: str
    words: tuple[str, ...]
    labels: dict[str, tuple[str, ...]] = field(default_factory=dict)
    num_colors: int = 0
    values: dict[str, tuple[float, ...]] = field(default_factory=dict)
    joined: tuple[bool, ...] = ()
    note: str = ""

    def __post_init__(self) -> None:
        rows = {**self.labels, **self.values, **({"joined": self.joined} if self.joined else {})}
        for name, row in rows.items():
            if len(row) != len(self.words):
                raise ValueError(f"{self.title!r}: {len(row)} of {name!r} for {len(self.words)} words")

    @classmethod
    def of_pieces(
        cls,
        title: str,
        pieces: Sequence[str],
        experts: Mapping[str, Sequence[Sequence[int]]],
        num_experts: int,
        values: Mapping[str, Sequence[float]] | None = None,
        note: str = "",
    ) -> Words:
        """Return the tokens of sentencepiece with their experts.

        Args:
            title: their title.
            pieces: the tokens; ``START`` before one starts a word.
            experts: numbers of each token's experts, by layer; -1 is none.
            num_experts: E.
            values: as in ``Words``.
            note: sentence below.
        """
        apart = [not i or piece.startswith((START, "<")) for i, piece in enumerate(pieces)]
        after_mark = [bool(i) and pieces[i - 1].startswith("<") for i in range(len(pieces))]
        labels = {
            layer: tuple(" ".join(str(e) for e in own if 0 <= e < num_experts) for own in of_layer)
            for layer, of_layer in experts.items()
        }
        return cls(
            title,
            tuple(piece.removeprefix(START) or START for piece in pieces),
            labels,
            num_experts,
            {name: tuple(map(float, own)) for name, own in (values or {}).items()},
            tuple(not (a or b) for a, b in zip(apart, after_mark, strict=True)),
            note,
        )


Part = Text | Table | Code | Picture | Gallery | Words | ScatterChart | LineChart | BarChart | HeatmapChart
"""Whatever a section may hold."""


@dataclass(frozen=True)
class Section:
    """A titled part of a page.

    Attributes:
        title: its heading.
        parts: its contents, in order.
        sections: subsections, such as one for each of several models.
    """

    title: str
    parts: tuple[Part, ...] = ()
    sections: tuple[Section, ...] = ()

    @property
    def is_empty(self) -> bool:
        return not self.parts and all(section.is_empty for section in self.sections)

    def below(self, folder: Path) -> Section:
        """Return the section with the paths of its pictures taken as relative to ``folder``."""
        parts = tuple(replace(p, path=str(folder / p.path)) if isinstance(p, Picture) else p for p in self.parts)
        return replace(self, parts=parts, sections=tuple(s.below(folder) for s in self.sections))


@dataclass(frozen=True)
class Entry:
    """One model of a run, as the index of runs lists it.

    Attributes:
        name: name of the model, such as "sparse"; empty where the run has one.
        figures: figures by name, such as ``{"test top1, %": 97.2, "MFLOPs": 6.6}``; a name means one thing in all runs.
    """

    name: str
    figures: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Page:
    """A report.

    Attributes:
        title: its heading, such as "Sparse and dense on digits".
        verdict: sentences that state the results, with intervals, the most important first; the page starts with them.
        figures: at most ten lines of figures, which the terminal prints as well; None: there are none.
        sections: everything else, in order; empty ones are left out.
        kind: "comparison" or "test", for example.
        date: when, in ISO format.
        entries: the models, for the index of runs.

    Raises:
        ValueError: more than ten lines of figures.
    """

    title: str
    verdict: tuple[str, ...]
    figures: Table | None = None
    sections: tuple[Section, ...] = ()
    kind: str = "report"
    date: str = ""
    entries: tuple[Entry, ...] = ()

    def __post_init__(self) -> None:
        if self.figures is not None and len(self.figures.rows) > MOST_FIGURES:
            raise ValueError(f"figures have {len(self.figures.rows)} lines: at most {MOST_FIGURES} are shown at once")


MOST_FIGURES = 10


def shown(value: float | None, digits: int = 4) -> str:
    """Return a number as text to so many significant digits; a dash for none and for NaN."""
    if value is None or math.isnan(value):
        return "–"
    return f"{value:,.{digits}g}" if abs(value) < 10**digits else f"{value:,.0f}"


def how_to_repeat(command: str, config: str = "", machine: Mapping[str, Any] | None = None) -> Section:
    """Return the section that says how a run was made.

    Args:
        command: shell command that does it again.
        config: the whole configuration in force, as YAML; empty for none.
        machine: facts as ``apps.base.machine.machine_facts`` gives them; None: the current ones.
    """
    facts = dict(machine_facts() if machine is None else machine)
    facts |= facts.pop("packages", {})
    rows = tuple((str(name), str(value)) for name, value in facts.items())
    parts: list[Part] = [Code("Command", command), Table("Machine, versions and commit", ("", "value"), rows)]
    if config:
        parts.append(Code("The whole configuration", config, closed=True))
    return Section("How to repeat it", tuple(parts))
