"""Answers and the experts behind them as HTML, which can be read aloud: an expert's number stands beside its colour."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from html import escape

import numpy as np

from apps.report.colors import expert_colors, ink_on
from apps.report.exhibit import Bars, Gates, Images, LayerPart, Part, Patches, Pieces, Said
from apps.report.images import data_url
from apps.report.page import Table

NONE = "\N{MULTIPLICATION SIGN}"
"""What stands for the expert of a token that none computed."""
_MOST_SHOWN = 16  # experts of gates; further ones are counted
_LEAST_WEIGHT = 0.005  # of an expert that is shown
_MOST_COLORS = 256  # experts of a layer up to which each has a colour of its own
_CELL = 40  # width of a patch in the picture's own unit


def draw_parts(parts: Iterable[Part | LayerPart]) -> str:
    """Return what is shown of parts."""
    return "".join(map(_draw, parts))


def _draw(part: Part | LayerPart) -> str:
    if isinstance(part, Bars):
        return _bars(part)
    if isinstance(part, Said):
        return _said(part)
    if isinstance(part, Images):
        return _images(part)
    if isinstance(part, Patches):
        return _patches(part)
    if isinstance(part, Pieces):
        return _words(part)
    if isinstance(part, Gates):
        return _gates(part)
    if isinstance(part, Table):
        return _table(part)
    return "".join(f"<p>{escape(line)}</p>" for line in part.lines)


def problem(line: str) -> str:
    """Return a line on what the model cannot take, which is read aloud at once."""
    return f'<p class="problem" role="alert">{escape(line)}</p>'


# ---- answers


def _bars(part: Bars) -> str:
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td class="bar"><div style="width:{100 * share:.2f}%"></div></td>'
        f"<td>{100 * share:.1f} %</td></tr>"
        for name, share in part.rows
    )
    return f'<table class="bars"><caption>{escape(part.title)}</caption><tbody>{rows}</tbody></table>'


def _said(part: Said) -> str:
    title = f'<p class="title">{escape(part.title)}</p>'
    return f'{title}<p class="said"><span>{escape(part.given)}</span>{escape(part.text)}</p>'


def _images(part: Images) -> str:
    items = "".join(
        f'<li><img src="{_png(image)}" alt=""/><span>{escape(text)}</span></li>' for text, image in part.images
    )
    return f'<p class="title">{escape(part.title)}</p><ol class="images">{items}</ol>'


def _table(part: Table) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in part.columns)
    rows = "".join(
        f'<tr><th scope="row">{escape(first)}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in rest)}</tr>'
        for first, *rest in part.rows
    )
    title = f"<caption>{escape(part.title)}</caption>" if part.title else ""
    return _scrolling(f"<table>{title}<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>", part.title)


def _scrolling(table: str, title: str) -> str:
    """Return a wide table in a frame of its own, which the keyboard can scroll."""
    return f'<div class="wide" role="region" tabindex="0" aria-label="{escape(title or "table")}">{table}</div>'


# ---- experts


def _patches(part: Patches) -> str:
    rows, columns = part.experts.shape[:2]
    colors = _Colors(part.names)
    source = _png(part.image)
    width, height = _CELL * columns, _CELL * rows
    cells = []
    for (r, c), own in _cells(part.experts):
        experts = colors.chosen(own)
        fill = colors.of(experts[0]) if experts else "none"
        x, y, text = _CELL * c, _CELL * r, " ".join(_numbers(colors, experts))
        cells.append(
            f'<g><title>{_says(colors, experts)}</title><rect x="{x}" y="{y}" width="{_CELL}" height="{_CELL}" '
            f'fill="{fill}"/><text x="{x + _CELL / 2:g}" y="{y + _CELL / 2:g}" style="font-size:{_size(text):g}px">'
            f"{text}</text></g>"
        )
    lines = "; ".join(
        " ".join(" and ".join(_numbers(colors, colors.chosen(own))) for own in line) for line in part.experts
    )
    image = f'<image href="{source}" width="{width}" height="{height}" preserveAspectRatio="none"/>'
    plain = f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="The image as the model sees it">{image}</svg>'
    label = f"Experts of the patches, row by row: {lines}"
    # Half the contrast and brighter, or the tints of dark patches all look black.
    faint = f'{image}<path d="M0 0H{width}V{height}H0Z" fill="#fff" fill-opacity="0.45"/>'
    drawn = f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{label}">{faint}{"".join(cells)}</svg>'
    return (
        f'<div class="patches"><figure>{plain}<figcaption>as the model sees it</figcaption></figure><figure>{drawn}'
        f"<figcaption>experts of each patch, the best first</figcaption></figure></div>"
        f"{_legend(colors, part.experts.reshape(-1, part.experts.shape[-1]), 'patches')}"
    )


def _cells(experts: np.ndarray) -> Iterable[tuple[tuple[int, int], np.ndarray]]:
    return (((r, c), experts[r, c]) for r in range(experts.shape[0]) for c in range(experts.shape[1]))


def _size(text: str) -> float:
    """Return the size at which a text fits into a patch."""
    return min(15.0, 1.5 * _CELL / max(len(text), 1))


def _words(part: Pieces) -> str:
    colors, place, words = _Colors(part.names), 0, []
    for word in part.words:
        pieces = []
        for piece in word:
            experts = colors.chosen(part.experts[place])
            place += 1
            style = f' style="{colors.style(experts[0])}"' if experts else ""
            numbers = f"<small>{' '.join(_numbers(colors, experts))}</small>"
            pieces.append(
                f'<span class="piece" title="{_says(colors, experts)}"{style}>{escape(piece)}{numbers}</span>'
            )
        words.append(f'<li class="word">{"".join(pieces)}</li>')
    return (
        f'<p class="title">{escape(part.title)}</p><ul class="words">{"".join(words)}</ul>'
        f"{_legend(colors, part.experts, part.unit)}"
    )


def _gates(part: Gates) -> str:
    weights = np.nan_to_num(part.weights)
    largest_E = weights.max(0)
    heaviest = np.sort(np.argsort(-largest_E, kind="stable")[:_MOST_SHOWN])
    shown = [int(e) for e in heaviest if largest_E[e] >= _LEAST_WEIGHT] or [int(largest_E.argmax())]
    head = "".join(f'<th scope="col">{escape(gate)}</th>' for gate in part.gates)
    rows = "".join(
        f'<tr><th scope="row">{escape(_expert(part.experts[e]))}</th>{"".join(map(_weight, part.weights[:, e]))}</tr>'
        for e in shown
    )
    left = len(part.experts) - len(shown)
    most = 100 * max((float(largest_E[e]) for e in range(len(part.experts)) if e not in shown), default=0.0)
    note = f"<p>{left} further experts have at most {most:.1f} % of a gate's weight.</p>" if left else ""
    table = (
        f'<table class="gates"><thead><tr><th scope="col">expert</th>{head}</tr></thead><tbody>{rows}</tbody></table>'
    )
    return f'<p class="title">{escape(part.title)}</p>{_scrolling(table, part.title)}{note}'


def _weight(weight: float) -> str:
    if np.isnan(weight):
        return "<td>\N{EN DASH}</td>"
    return f'<td><div class="weight" style="--share:{100 * weight:.1f}%">{100 * weight:.1f} %</div></td>'


def _legend(colors: _Colors, experts_TK: np.ndarray, unit: str) -> str:
    """Return how many tokens each expert has computed, those with the most first."""
    counts = Counter(e for own in experts_TK for e in colors.chosen(own))
    items = []
    for e, n in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        swatch = f'<span class="swatch" style="{colors.style(e)}">{escape(colors.names[e])}</span>'
        items.append(f"<li>{swatch} {n}</li>")
    none = sum(not colors.chosen(own) for own in experts_TK)
    if none:
        items.append(f"<li>{NONE} no expert: {none}</li>")
    unused = len(colors.names) - len(counts)
    more = f"<p>{unused} of the {len(colors.names)} experts took none.</p>" if unused else ""
    title = f'<p class="title">Experts, and the number of {unit} that each took</p>'
    return f'{title}<ul class="legend">{"".join(items)}</ul>{more}'


# ---- experts' colours and names


class _Colors:
    """The colours and names of a layer's experts.

    Args:
        names: the experts' names.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self._hex = expert_colors(min(len(names), _MOST_COLORS))

    def chosen(self, own: np.ndarray) -> list[int]:
        """Return the experts among ``own`` that computed a token."""
        return [int(e) for e in own if 0 <= e < len(self.names)]

    def of(self, expert: int) -> str:
        return self._hex[expert % len(self._hex)]

    def style(self, expert: int) -> str:
        """Return an expert's colour with black or white letters, whichever can be read better on it."""
        color = self.of(expert)
        return f"background:{color};color:{ink_on(color)}"


def _numbers(colors: _Colors, experts: Sequence[int]) -> list[str]:
    """Return the names of a token's experts, or the sign for none."""
    return [escape(colors.names[e]) for e in experts] or [NONE]


def _says(colors: _Colors, experts: Sequence[int]) -> str:
    """Return which experts computed a token, in words."""
    if not experts:
        return "no expert"
    return escape(", ".join([_expert(colors.names[experts[0]]), *(colors.names[e] for e in experts[1:])]))


def _expert(name: str) -> str:
    """Return "expert 3" for a number, and other names as they are."""
    return f"expert {name}" if name.isdigit() else name


def _png(image: np.ndarray) -> str:
    """Return an image as a URL that holds it."""
    from PIL import Image

    return data_url(Image.fromarray(image))
