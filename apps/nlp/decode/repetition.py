"""A search that repeats itself less."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Penalized:
    """A model under the interface of a search, whose logits of ids that are there already are lowered.

    Args:
        model: the model.
        penalty: divides logits above 0 and multiplies the others.
    """

    def __init__(self, model: Any, penalty: float) -> None:
        self.model, self.penalty = model, penalty

    def step(self, token_R: Tensor, cache: ReadRows) -> Tensor:
        """Read one more id of each row, and return the logits of the next, (R, V)."""
        logits_RV: Tensor = self.model.step(token_R, cache.rows)
        if cache.read_RV is None:
            cache.read_RV = torch.zeros_like(logits_RV, dtype=torch.bool)
        read_RV = cache.read_RV.scatter_(1, token_R[:, None], True)
        lowered_RV = torch.where(logits_RV > 0, logits_RV / self.penalty, logits_RV * self.penalty)
        return torch.where(read_RV, lowered_RV, logits_RV)


class ReadRows:
    """A model's cache, with the ids that each row has read, bool (R, V); None: none yet."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows
        self.read_RV: Tensor | None = None

    def expand(self, copies: int) -> ReadRows:
        """Repeat each row ``copies`` times, side by side. Changes the rows, and returns them."""
        self.rows = self.rows.expand(copies)
        self.read_RV = None if self.read_RV is None else self.read_RV.repeat_interleave(copies, 0)
        return self

    def select(self, index: Tensor) -> ReadRows:
        """Continue from these rows, in this order. Changes them, and returns them."""
        self.rows = self.rows.select(index)
        self.read_RV = None if self.read_RV is None else self.read_RV[index]
        return self
