"""What a step of a search decides, on the device and off it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Report:
    """A sentence's part of a ``Choice``, k values each."""

    token: list[float]
    parent: list[float]
    score: list[float]
    closed_score: list[float]
    closed_parent: list[float]


@dataclass
class Choice:
    """What becomes of b sentences' k rows after a step.

    Attributes:
        token_bk: int64, the id that each new row ends in.
        parent_bk: int64, the row of the sentence that it goes on from.
        score_bk: its sum of log p; -inf where there is no such row.
        closed_score_bk: the sums of hypotheses that end with this step; -inf where there are fewer.
        closed_parent_bk: int64, the rows that they end.
        tied_b: bool, ids of equal log p were chosen from, not necessarily the lowest; None: none were.
    """

    token_bk: Tensor
    parent_bk: Tensor
    score_bk: Tensor
    closed_score_bk: Tensor
    closed_parent_bk: Tensor
    tied_b: Tensor | None = None

    def reports(self) -> tuple[list[Report], bool]:
        """The same as plain values, by sentence, and whether any is tied: one wait for the device."""
        parts = [self.token_bk, self.parent_bk, self.score_bk, self.closed_score_bk, self.closed_parent_bk]
        if self.tied_b is not None:
            parts.append(self.tied_b[:, None].expand_as(self.token_bk))
        rows = torch.stack([part.double() for part in parts], 1).tolist()
        return [Report(*row[:5]) for row in rows], self.tied_b is not None and any(row[5][0] for row in rows)
