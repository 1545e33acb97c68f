"""A training step of a layer as tensors by name, how two steps are compared, and a layer against its export."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from core import Routing, RoutingContext, aux_loss, record


def step(
    layer: nn.Module,
    x: Tensor,
    context: RoutingContext | None = None,
    run: Callable[..., Any] | None = None,
    seed: int | None = None,
) -> dict[str, Tensor]:
    """Return the output, the auxiliary loss and all gradients of one step, and the decision where it is one of pairs.

    ``run`` computes in place of ``layer``, such as its compiled form; random numbers start from ``seed`` where it is
    given.
    """
    layer.zero_grad()
    if seed is not None:
        torch.manual_seed(seed)
    x = x.clone().requires_grad_()
    with record(layer) as tape:
        y = (layer if run is None else run)(x, context)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    loss = aux_loss(tape)
    ((y * weight).sum() + loss).backward()
    results = {"y": y.detach(), "aux": loss.detach(), "dx": x.grad}
    for routing in (entry.routing for entry in tape.entries if len(tape) == 1):
        if isinstance(routing, Routing):
            results |= {"ids": routing.expert_ids_N, "gates": routing.gates_N.detach()}
            results["load"] = routing.tokens_per_expert_E
    return results | {n: p.grad.clone() for n, p in layer.named_parameters() if p.grad is not None}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 1e-5, atol: float = 1e-6) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


def assert_exports(
    layer: nn.Module, dim: int, length: int = 6, least: int = 1, rtol: float = 1e-5, atol: float = 1e-6
) -> None:
    """The exported layer equals ``layer`` at any number of sequences and of tokens from ``least`` on."""
    sizes = {0: torch.export.Dim("batch", min=1, max=64), 1: torch.export.Dim("length", min=least, max=512)}
    program = torch.export.export(layer, (torch.randn(2, length, dim),), dynamic_shapes={"x": sizes}).module()
    for shape in ((2, length, dim), (1, least, dim), (5, 40, dim)):
        x = torch.randn(shape)
        torch.testing.assert_close(program(x), layer(x), rtol=rtol, atol=atol)
