"""The undocumented parts of transformers that are used here."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def apply_gate(experts: Any, hidden: Tensor) -> Tensor:
    """Return the hidden layer of both halves, as the experts combine them; every decorated class has the method."""
    combined: Tensor = experts._apply_gate(hidden)
    return combined


def has_plain_gate(experts: Any) -> bool:
    """Return whether the halves are combined by transformers' default, ``act(gate) * up``."""
    return type(experts)._apply_gate.__module__ == "transformers.integrations.moe"
