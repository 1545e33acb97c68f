"""The page of a search: small pictures of the images that fit each query, in one file."""

from __future__ import annotations

import os
import urllib.parse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageOps

from apps.base.machine import moment
from apps.base.messages import one_line
from apps.multimodal.search.vectors import readable
from apps.report.images import data_url
from apps.report.page import Code, Gallery, Page, Part, Section, Table, Text, Thumbnail
from apps.report.page.html import render
from apps.report.page.writing import write_html
from apps.vision.image_files import BadImage, to_pixels

_SIDE = 176
"""Pixels of the longer side of a small picture: two beside each other fill a telephone."""
_MOST_PICTURES = 500
"""Pictures of a page; with more it would grow beyond 5 MB, and the others are named without."""

_LONGEST = 60
"""Characters of a query in a heading."""


@dataclass(frozen=True)
class Hits:
    """The images that fit a query best, the best first.

    Attributes:
        query: the text, or the path of the image.
        is_image: whether it is an image.
        paths: the images.
        scores: the product of each one's vector with the query's, from -1 to 1.
    """

    query: str
    is_image: bool
    paths: tuple[str, ...]
    scores: tuple[float, ...]

    @property
    def title(self) -> str:
        """The query, cut, as a heading."""
        return f"Images {'like' if self.is_image else 'for'} “{self._short}”"

    @property
    def _short(self) -> str:
        text = one_line(Path(self.query).name if self.is_image else self.query)
        return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"

    @property
    def is_cut(self) -> bool:
        """Whether the heading has not all of the text."""
        return not self.is_image and self._short.endswith("…")


def write_search_page(hits: Sequence[Hits], path: Path, searched: str) -> None:
    """Write the page of a search as one HTML file, whole or not at all.

    Args:
        hits: the results for each query.
        path: the file; links lead from its folder to the images.
        searched: sentence that says what was searched.

    Raises:
        ValueError: a file is there that no page of moesaic's is.
    """
    room, sections = _MOST_PICTURES, []
    for of_query in hits:
        shown = min(len(of_query.paths), room)
        room -= shown
        sections.append(Section(of_query.title, tuple(_parts(of_query, shown, path.parent))))
    title = sections[0].title if len(sections) == 1 else f"Images for {len(sections)} queries"
    sections = [Section("Best images", sections[0].parts)] if len(sections) == 1 else sections
    about = Section("About this search", (Text.of(searched, "A score is the product of two vectors of length 1."),))
    write_html(render(Page(title, (), None, (*sections, about), kind="search", date=moment())), path)


def _parts(hits: Hits, shown: int, folder: Path) -> list[Part]:
    ranked = [(i, f"{score:.3f}", path) for i, (score, path) in enumerate(zip(hits.scores, hits.paths, strict=True), 1)]
    parts: list[Part] = []
    if hits.is_image:
        parts.append(Gallery("The image of the query", (thumbnail(hits.query, (Path(hits.query).name,), folder),)))
    elif hits.is_cut:
        parts.append(Code("The whole query", hits.query, closed=True))
    if shown:
        pictures = [
            thumbnail(path, (f"{i}. {score}", readable(Path(path).name)), folder) for i, score, path in ranked[:shown]
        ]
        parts.append(Gallery("Best first, with their scores", tuple(pictures)))
    if shown < len(ranked):
        rows = tuple((str(i), score, readable(path)) for i, score, path in ranked[shown:])
        parts.append(Table("Further images", ("place", "score", "file"), rows))
    return parts


def thumbnail(path: str, lines: tuple[str, ...], folder: Path) -> Thumbnail:
    """Return a small picture of an image file, on white where it is transparent, turned as its camera was held.

    Args:
        path: the file.
        lines: lines below the picture.
        folder: the page's folder, for the link.
    """
    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):  # 16 bits a pixel
                small = Image.fromarray(to_pixels(image, path).permute(1, 2, 0).contiguous().numpy())
            else:
                image.draft("RGB", (2 * _SIDE, 2 * _SIDE))  # a JPEG is decoded at a part of its size
                small = ImageOps.exif_transpose(image).convert("RGBA")
        small.thumbnail((_SIDE, _SIDE))
    except (OSError, SyntaxError, BadImage):  # gone, or changed, since it was encoded
        small = Image.new("RGB", (_SIDE, _SIDE), "white")
        lines = (*lines, "cannot be read any more")
    if small.mode == "RGBA":
        ground = Image.new("RGBA", small.size, "white")
        small = Image.alpha_composite(ground, small).convert("RGB")
    source = data_url(small, "JPEG", quality=80)
    link = urllib.parse.quote(os.fsencode(os.path.relpath(path, folder).replace(os.sep, "/")))
    return Thumbnail(source, small.size, readable(Path(path).name), lines, link)
