"""A layer of ours beside a peer's: the peer's weights go in, and the output and every gradient are compared."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Read = Callable[[Tensor], Tensor]
Layout = Callable[[Any, Read], dict[str, Tensor]]
"""Returns what ``read`` gives of each parameter of the peer, under our names and in our layout."""


def tensor_of(module: nn.Module, name: str) -> Tensor:
    for part in name.split("."):
        module = getattr(module, part)
    return module


def load(layer: nn.Module, weights: dict[str, Tensor]) -> None:
    """Give the layer a weight for each of its parameters."""
    names = {name for name, _ in layer.named_parameters()}
    assert set(weights) == names
    with torch.no_grad():
        for name, value in weights.items():
            tensor_of(layer, name).copy_(value)


def check_same(
    layer: nn.Module,
    peer: Any,
    layout: Layout,
    x: Tensor,
    ours: Callable[[Tensor], Tensor],
    theirs: Callable[[Tensor], Tensor],
    **close: float,
) -> None:
    """Assert the same output, and the same gradient of ``x`` and of each weight, of a random sum of the output.

    Args:
        layer, peer: with equal weights already.
        layout: the peer's weights in our layout.
        x: the input.
        ours, theirs: what computes the output.
        close: ``rtol`` and ``atol``; none: those of the dtype.
    """
    ours_x, their_x = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, their_y = ours(ours_x), theirs(their_x)
    torch.testing.assert_close(y, their_y, **close)
    weights = torch.randn_like(y)
    (y * weights).sum().backward()
    (their_y * weights).sum().backward()
    torch.testing.assert_close(ours_x.grad, their_x.grad, **close)
    for name, wanted in layout(peer, lambda p: p.grad).items():
        got = tensor_of(layer, name).grad
        torch.testing.assert_close(got, wanted, **close, msg=lambda m, n=name: f"{n}: {m}")
