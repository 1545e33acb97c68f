"""What a model answers and which experts computed it, as plain values that a page draws."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from apps.report.exhibit.fields import Field
from apps.report.page import Table, Text


@dataclass(frozen=True)
class Bars:
    """Shares with their names.

    Attributes:
        title: what they are.
        rows: name and share in 0..1 of each, in the order in which they are shown.
    """

    title: str
    rows: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Said:
    """A text that a model has written.

    Attributes:
        title: what it is.
        text: the text.
        given: the text before it, which the user has typed.
    """

    title: str
    text: str
    given: str = ""


@dataclass(frozen=True)
class Images:
    """Images that a model has chosen, in their order.

    Attributes:
        title: what they are.
        images: what is said of each, and the image, uint8 (H, W) or (H, W, 3).
    """

    title: str
    images: tuple[tuple[str, np.ndarray], ...]


@dataclass(frozen=True)
class Patches:
    """An image, and the experts that computed each of its patches.

    Attributes:
        image: uint8 (H, W) or (H, W, 3), as the model sees it.
        experts: int (h, w, K), the experts of each patch, best first; E where there is none.
        names: the E experts' names.
    """

    image: np.ndarray
    experts: np.ndarray
    names: tuple[str, ...]


@dataclass(frozen=True)
class Pieces:
    """The pieces of a text, word by word, and the experts that computed each of them.

    Attributes:
        title: what the words are.
        words: the pieces of each word.
        experts: int (T, K), the experts of each of the T pieces, best first; E where there is none.
        names: the E experts' names.
        unit: what the pieces are called.

    Raises:
        ValueError: another number of pieces than of experts' rows.
    """

    title: str
    words: tuple[tuple[str, ...], ...]
    experts: np.ndarray
    names: tuple[str, ...]
    unit: str = "subwords"

    def __post_init__(self) -> None:
        count = sum(map(len, self.words))
        if len(self.experts) != count:
            raise ValueError(f"{self.title!r} has {count} pieces, and experts of {len(self.experts)}")


@dataclass(frozen=True)
class Gates:
    """The weight that each gate gives each expert.

    Attributes:
        title: what they are.
        gates: names of the gates.
        experts: names of the E experts.
        weights: (gates, E), in 0..1; NaN where a gate does not reach an expert.
    """

    title: str
    gates: tuple[str, ...]
    experts: tuple[str, ...]
    weights: np.ndarray


Part = Bars | Said | Images | Text | Table
"""Whatever shows an answer."""
LayerPart = Patches | Pieces | Gates
"""Whatever shows the experts of a layer."""


@dataclass(frozen=True)
class Answer:
    """What a model answers.

    Attributes:
        parts: the answer itself.
        layers: the experts that computed it, by the layer's name in the order of the passes; empty for a dense model.
    """

    parts: tuple[Part, ...]
    layers: Mapping[str, tuple[LayerPart, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Example:
    """Something that a user may give the model at a click.

    Attributes:
        label: its name on the page; an image is shown itself.
        values: a value for each field, as it stands on the page; an image is uint8 (H, W) or (H, W, 3).
    """

    label: str
    values: tuple[Any, ...]


@dataclass(frozen=True)
class Exhibit:
    """A model at work.

    Attributes:
        about: a sentence or two on what to do, and on what comes of it.
        action: word on the button.
        fields: what a user gives.
        answer: function from the fields' values, in their order, to the answer; a ``ValueError`` of one line says what
            the model cannot take.
        examples: what a user may take at a click.
    """

    about: str
    action: str
    fields: tuple[Field, ...]
    answer: Callable[[Sequence[Any]], Answer]
    examples: tuple[Example, ...] = ()
