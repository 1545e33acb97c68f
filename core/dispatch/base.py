"""The dispatchers' protocol."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from ..contract import Rows


class Dispatcher(Protocol):
    def dispatch(self, x: Tensor, routing: Any) -> Rows:
        """(T, D) tokens to rows sorted by expert. ``routing`` is what the layer's router decides."""

    def combine(self, rows: Rows) -> Tensor:
        """The experts' output to (T, D_out): what is not weighted and summed yet is so here."""
