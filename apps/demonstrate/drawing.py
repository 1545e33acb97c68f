"""Answers and the experts behind them as HTML, which can be read aloud: an expert's number is next to its color."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from markupsafe import Markup

from apps.base.templates import template
from apps.report.colors import expert_colors, ink_on
from apps.report.exhibit import LayerPart, Part
from apps.report.images import NO_EXPERT, data_url

_MOST_SHOWN = 16  # experts of gates; further ones are counted
_LEAST_WEIGHT = 0.005  # of an expert that is shown
_MOST_COLORS = 256  # experts of a layer up to which each has a color of its own
_CELL = 40  # width of a patch in the picture's own unit


def draw_parts(parts: Iterable[Part | LayerPart]) -> str:
    """Return the HTML of parts."""
    return template(Path(__file__).with_name("drawing.html")).render(
        parts=list(parts),
        name_of=lambda part: type(part).__name__,
        colors_of=_Colors,
        heaviest=_heaviest,
        expert_name=_expert,
        png=_png,
        cell=_CELL,
        none_sign=NO_EXPERT,
    )


def problem(line: str) -> str:
    """Return a line on the input that the model cannot take, which is read aloud at once."""
    return Markup('<p class="problem" role="alert">{}</p>').format(line)


def _heaviest(weights: np.ndarray) -> tuple[list[int], float]:
    """Return the experts of gates (gates, E) that are shown, and the largest weight of the others."""
    largest_E = np.nan_to_num(weights).max(0)
    heaviest = np.sort(np.argsort(-largest_E, kind="stable")[:_MOST_SHOWN])
    shown = [int(e) for e in heaviest if largest_E[e] >= _LEAST_WEIGHT] or [int(largest_E.argmax())]
    return shown, float(np.delete(largest_E, shown).max(initial=0.0))


class _Colors:
    """The colors and names of a layer's experts.

    Args:
        names: the experts' names.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        self._hex = expert_colors(min(len(names), _MOST_COLORS))

    def chosen(self, own: np.ndarray) -> list[int]:
        """Return the experts among ``own`` that computed a token."""
        return [int(e) for e in own if 0 <= e < len(self.names)]

    def numbers(self, own: np.ndarray) -> list[str]:
        """Return the names of a token's experts, or the sign for none."""
        return [self.names[e] for e in self.chosen(own)] or [NO_EXPERT]

    def says(self, own: np.ndarray) -> str:
        """Return which experts computed a token, in words."""
        first, *rest = [self.names[e] for e in self.chosen(own)] or ["no expert"]
        return ", ".join((_expert(first), *rest))

    def of(self, expert: int) -> str:
        return self._hex[expert % len(self._hex)]

    def ink(self, expert: int) -> str:
        """Return black or white, whichever can be read better on the expert's color."""
        return ink_on(self.of(expert))

    def counts(self, experts_TK: np.ndarray) -> list[tuple[int | None, int]]:
        """Return how many tokens each expert has computed, those with the most first, and how many None has."""
        chosen = [self.chosen(own) for own in experts_TK]
        counts = sorted(Counter(e for own in chosen for e in own).items(), key=lambda item: (-item[1], item[0]))
        none = chosen.count([])
        return [*counts, *([(None, none)] if none else [])]


def _expert(name: str) -> str:
    """Return "expert 3" for a number, and other names as they are."""
    return f"expert {name}" if name.isdigit() else name


def _png(image: np.ndarray) -> str:
    """Return an image as a URL that holds it."""
    from PIL import Image

    return data_url(Image.fromarray(image))
