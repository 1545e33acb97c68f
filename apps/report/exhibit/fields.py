"""What a user gives a model. A field takes what stands on the page (``read``), and refuses what the model cannot take.

Each ``read`` raises a ``ValueError`` of one line that names the field, the value and the rule.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass

from apps.base.messages import excerpt


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
        whole: only whole numbers.
        least, most: bounds; None: there is none.
    """

    label: str
    value: float | None = None
    may_be_empty: bool = False
    whole: bool = False
    least: float | None = None
    most: float | None = None

    def read(self, raw: str | float | None) -> float | None:
        """Return the number; a whole one as an ``int`` where the field asks for it."""
        text = str("" if raw is None else raw).strip()
        if not text and self.may_be_empty:
            return None
        try:
            number = int(text) if self.whole else float(text)
        except ValueError:
            raise ValueError(f"{self.label}={excerpt(text)} is not a {'whole ' if self.whole else ''}number") from None
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
    """A list of items, such as a history, in an order.

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
    """Return ``; did you mean 'x'?``, or nothing where no choice is near, or there are too many to look at."""
    near = difflib.get_close_matches(text, choices, n=1, cutoff=0.6) if len(choices) <= 20_000 else []
    return f"; did you mean {near[0]!r}?" if near else ""
