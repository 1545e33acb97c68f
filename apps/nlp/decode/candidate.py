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


def check_one(options: Mapping[str, Any]) -> None:
    """Reject to be asked for several candidates of a text where one is returned.

    Raises:
        ValueError: naming ``num_best``.
    """
    if options.get("num_best", 1) != 1:
        raise ValueError(f"num_best={options['num_best']}: predict returns one text each; candidates has the others")


def in_columns(rows: Sequence[Sequence[Candidate]]) -> tuple[list[str], Tensor, list[list[str]]]:
    """Return the best text of each row, its score, float64 (B,), and the further texts, best first."""
    scores_B = torch.tensor([best.score for best, *_ in rows], dtype=torch.float64)
    return [best.text for best, *_ in rows], scores_B, [[c.text for c in further] for _, *further in rows]
