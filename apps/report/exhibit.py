"""A trained model at work, as plain parts: the user's input, the model's answer, and the experts that computed it.

``moesaic demo`` makes a page of it. ``apps.task.Task.exhibit`` returns the ``Exhibit`` of a model: its fields, a
function that answers what they read, and examples of the run's data, which are left out if there are none. The fields
and the parts are plain values and functions: no library of pages is imported here or in an app. A field's ``read``
raises a ``ValueError`` of one line that names the field, the value and the rule.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from apps.base.messages import excerpt
from apps.report.page import Table, Text


@dataclass(frozen=True)
class ImageField:
    """An image file.

    Attributes:
        label: its name on the page.
        may_be_empty: whether there may be none, None.
    """

    label: str
    may_be_empty: bool = False

    def read(self, raw: str | None) -> str | None:
        """Return the path of the file."""
        if not raw and self.may_be_empty:
            return None
        if not raw:
            raise ValueError(f"{self.label}: there is none yet; drop one here, or take an example")
        return raw


@dataclass(frozen=True)
class TextField:
    """A text.

    Attributes:
        label: its name on the page.
        value: the text at first.
        lines: its height.
        may_be_empty: whether an empty text is one.
        longest: most characters.
        by_line: whether each line is a text of its own.
    """

    label: str
    value: str = ""
    lines: int = 3
    may_be_empty: bool = False
    longest: int = 10_000
    by_line: bool = False

    def read(self, raw: str | None) -> str:
        """Return the text on one line, or of several texts each on its own; without spaces around them."""
        lines = (raw or "").splitlines() if self.by_line else [raw or ""]
        text = "\n".join(filter(None, (" ".join(line.split()) for line in lines)))
        if not text and not self.may_be_empty:
            raise ValueError(f"{self.label} is empty: type something first")
        if len(text) > self.longest:
            raise ValueError(f"{self.label} has {len(text):,} characters: at most {self.longest:,} are read")
        return text


@dataclass(frozen=True)
class NumberField:
    """A number, typed as text, so that a wrong one can be named.

    Attributes:
        label: its name on the page.
        value: the number at first; None: empty.
        may_be_empty: whether an empty field is a missing value, None.
        whole: accept only integers.
        least, most: bounds; None: there is none.
    """

    label: str
    value: float | None = None
    may_be_empty: bool = False
    whole: bool = False
    least: float | None = None
    most: float | None = None

    def read(self, raw: str | float | None) -> float | None:
        """Return the number; a whole one as an ``int`` if the field asks for it."""
        text = str("" if raw is None else raw).strip()
        if not text and self.may_be_empty:
            return None
        try:
            number = int(text) if self.whole else float(text)
        except ValueError:
            kind = "an integer" if self.whole else "a number"
            raise ValueError(f"{self.label}={excerpt(text)} is not {kind}") from None
        if not math.isfinite(number):
            raise ValueError(f"{self.label}={text} is not a finite number")
        if self.least is not None and number < self.least:
            raise ValueError(f"{self.label}={text} must be at least {self.least:g}")
        if self.most is not None and number > self.most:
            raise ValueError(f"{self.label}={text} must be at most {self.most:g}")
        return number


@dataclass(frozen=True)
class ChoiceField:
    """One of several values.

    Attributes:
        label: its name on the page.
        choices: the values.
        value: the value at first; None: empty.
        may_be_empty: whether an empty field is a missing value, None.
    """

    label: str
    choices: tuple[str, ...]
    value: str | None = None
    may_be_empty: bool = False

    def read(self, raw: str | None) -> str | None:
        """Return the value."""
        text = str("" if raw is None else raw).strip()
        if text in self.choices:
            return text
        if not text and self.may_be_empty:
            return None
        known = f"{len(self.choices):,} values that the model knows"
        raise ValueError(f"{self.label}={excerpt(text)} is none of the {known}{_near(text, self.choices)}")


@dataclass(frozen=True)
class ItemsField:
    """A list of items, such as a sequence of past items, in an order.

    Attributes:
        label: its name on the page.
        names: the items' names on the page, without doubles.
        items: the items themselves, by place in ``names``.
        value: names of the items at first.
        most: number of items at most.
    """

    label: str
    names: tuple[str, ...]
    items: tuple[str, ...]
    value: tuple[str, ...] = ()
    most: int = 50

    def read(self, raw: Sequence[str] | str | None) -> list[str]:
        """Return the items, of names or of a text with a name a line."""
        texts = raw.splitlines() if isinstance(raw, str) else list(raw or ())
        texts = [text.strip() for text in texts if text.strip()]
        if not texts:
            raise ValueError(f"{self.label} is empty: choose an item first")
        if len(texts) > self.most:
            raise ValueError(f"{self.label} has {len(texts)} items: at most {self.most} are read")
        by_name = {**dict(zip(self.items, self.items, strict=True)), **dict(zip(self.names, self.items, strict=True))}
        for text in texts:
            if text not in by_name:
                near = _near(text, self.names)
                known = f"{len(self.names):,} items that the model knows"
                raise ValueError(f"{self.label}: {excerpt(text)} is none of the {known}{near}")
        return [by_name[text] for text in texts]


Field = ImageField | TextField | NumberField | ChoiceField | ItemsField
"""Whatever a page may ask for."""


def _near(text: str, choices: Sequence[str]) -> str:
    """Return ``; did you mean 'x'?``, or nothing if no choice is near, or there are too many to look at."""
    near = difflib.get_close_matches(text, choices, n=1, cutoff=0.6) if len(choices) <= 20_000 else []
    return f"; did you mean {near[0]!r}?" if near else ""


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
        title: its title.
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
        images: caption of each, and the image, uint8 (H, W) or (H, W, 3).
    """

    title: str
    images: tuple[tuple[str, np.ndarray], ...]


@dataclass(frozen=True)
class Patches:
    """An image, and the experts that computed each of its patches.

    Attributes:
        image: uint8 (H, W) or (H, W, 3), as the model sees it.
        experts: int (h, w, K), the experts of each patch, best first; -1 if there is none.
        names: the E experts' names.
    """

    image: np.ndarray
    experts: np.ndarray
    names: tuple[str, ...]


@dataclass(frozen=True)
class Pieces:
    """The tokens of a text, word by word, and the experts that computed each token.

    Attributes:
        title: title of the words.
        words: the tokens of each word.
        experts: int (T, K), the experts of each of the T tokens, best first; -1 if there is none.
        names: the E experts' names.
        unit: name of a token on the page.

    Raises:
        ValueError: the number of tokens differs from the number of experts' rows.
    """

    title: str
    words: tuple[tuple[str, ...], ...]
    experts: np.ndarray
    names: tuple[str, ...]
    unit: str = "subwords"

    def __post_init__(self) -> None:
        count = sum(map(len, self.words))
        if len(self.experts) != count:
            raise ValueError(f"{self.title!r} has {count} tokens, and experts of {len(self.experts)}")


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
    """The answer of a model.

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
        values: a value for each field, as the page shows it; an image is uint8 (H, W) or (H, W, 3).
    """

    label: str
    values: tuple[Any, ...]


@dataclass(frozen=True)
class Exhibit:
    """A model at work.

    Attributes:
        about: instructions and their result, in a sentence or two.
        action: word on the button.
        fields: the user's inputs.
        answer: function from the fields' values, in their order, to the answer; a ``ValueError`` of one line names an
            input that the model cannot take.
        examples: inputs to choose with a click.
        grows: whether ``answer`` also takes a function, and calls it with the answer so far each time it grows.
    """

    about: str
    action: str
    fields: tuple[Field, ...]
    answer: Callable[..., Answer]
    examples: tuple[Example, ...] = ()
    grows: bool = False
