"""The texts of a search, as a caller gets them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Candidate(NamedTuple):
    """A text that a model writes.

    Attributes:
        text: a translation, a caption, or a prompt with what follows it.
        score: its score in the search, as ``DecodeConfig`` says.
    """

    text: str
    score: float


def one_each(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options of a search for one candidate of each text.

    Raises:
        ValueError: they ask for several.
    """
    if (most := options.get("num_return_sequences", 1)) != 1:
        raise ValueError(f"num_return_sequences={most}: predict returns one text each; candidates has the others")
    return {**options, "num_return_sequences": 1}


def in_columns(rows: Sequence[Sequence[Candidate]]) -> tuple[list[str], Tensor, list[list[str]]]:
    """Return the best text of each row, its score, float64 (B,), and the further texts, best first."""
    scores_B = torch.tensor([best.score for best, *_ in rows], dtype=torch.float64)
    return [best.text for best, *_ in rows], scores_B, [[c.text for c in further] for _, *further in rows]
