"""What a part of the campaign says of a case."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Outcome:
    """What was done in a case, and what came of it.

    Attributes:
        number: of the case. A part that tries cases of microseconds gives a number to a batch of them.
        what: what was done; the words before the first colon are its kind, and cases are counted by kind.
        fault: what came in place of what should; "": nothing.
        count: cases of this number. 0 is a note: the line is printed, and nothing was tried.
    """

    number: int
    what: str
    fault: str = ""
    count: int = 1


def generator(part: str, number: int) -> np.random.Generator:
    """Return the generator from which all that is random in a case follows."""
    return np.random.default_rng((*part.encode(), number))
