"""A search that repeats itself less."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Penalized:
    """A model and its cache under the interface of a search; logits of the ids that a row has read are lowered.

    Args:
        model, cache: the model's own.
        penalty: divides logits above 0, and multiplies the others.
    """

    def __init__(self, model: Any, cache: Any, penalty: float) -> None:
        self.model, self.cache, self.penalty = model, cache, penalty
        self._read_RV: Tensor | None = None

    def step(self, token_R: Tensor, cache: Penalized) -> Tensor:
        """Read one more id of each row, and return the logits of the next, (R, V)."""
        logits_RV: Tensor = self.model.step(token_R, self.cache)
        if self._read_RV is None:
            self._read_RV = torch.zeros_like(logits_RV, dtype=torch.bool)
        self._read_RV.scatter_(1, token_R[:, None], True)
        lowered_RV = torch.where(logits_RV > 0, logits_RV / self.penalty, logits_RV * self.penalty)
        return torch.where(self._read_RV, lowered_RV, logits_RV)

    def expand(self, copies: int) -> Penalized:
        """Repeat each row ``copies`` times, side by side."""
        self.cache, self._read_RV = self.cache.expand(copies), self._read_RV.repeat_interleave(copies, 0)  # type: ignore[union-attr]
        return self

    def select(self, index: Tensor) -> Penalized:
        """Continue from these rows, in this order."""
        self.cache, self._read_RV = self.cache.select(index), self._read_RV[index]  # type: ignore[index]
        return self
