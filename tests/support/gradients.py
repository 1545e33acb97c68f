"""Gradients of a layer beside those of its slow loop."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from core.testing.check import close


def close_gradients(actual: Mapping[str, Tensor | None], expected: Mapping[str, Tensor | None], bound: float) -> None:
    """Compare gradients by name; one that is None counts as zeros."""
    for name, wanted in expected.items():
        given = actual[name]
        if wanted is None or given is None:
            assert all(g is None or not g.any() for g in (wanted, given)), name
        else:
            close(given, wanted, f"the gradient of {name}", bound)
