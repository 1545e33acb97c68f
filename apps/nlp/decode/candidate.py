"""The texts of a search, as a caller gets them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Candidate(NamedTuple):
    """A text that a model writes.

    Attributes:
        text: a translation, a caption, or a prompt with what follows it.
        score: its score in the search, as ``DecodeConfig`` says.
    """

    text: str
    score: float


def check_one(options: Mapping[str, Any]) -> None:
    """Refuse to be asked for several candidates of a text where one is returned.

    Raises:
        ValueError: naming ``num_best``.
    """
    if options.get("num_best", 1) != 1:
        raise ValueError(f"num_best={options['num_best']}: predict returns one text each; candidates has the others")
