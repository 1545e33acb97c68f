"""Named checks, and comparisons of tensors that they are made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from ..contract import Decision, RoutingContext, record
from ..layers import MoE, aux_loss
from .router_case import seeded

FLOAT32 = 2e-6
"""Bound of an error in float32, over the largest element: sums of a few hundred products, each off by at most 6e-8."""


Case = TypeVar("Case")
"""A ``RouterCase`` or an ``ExpertCase``."""


@dataclass(frozen=True)
class Check(Generic[Case]):
    """A property of every case that ``applies`` to: ``run`` raises an ``AssertionError`` if it does not hold."""

    name: str
    applies: Callable[[Case], bool]
    run: Callable[[Case], None]


class Checks(list[Check[Case]]):
    """Checks in the order they are written in."""

    def keeps(
        self, name: str, applies: Callable[[Case], bool] = lambda case: True
    ) -> Callable[[Callable[[Case], None]], Callable[[Case], None]]:
        """Return a decorator that adds a function as the check of this name."""

        def add(run: Callable[[Case], None]) -> Callable[[Case], None]:
            self.append(Check(name, applies, run))
            return run

        return add


def hold(condition: Any, message: str) -> None:
    """Raise an ``AssertionError`` unless the condition is true: an ``assert`` would be nothing under ``python -O``."""
    if not condition:
        raise AssertionError(message)


def close(actual: Tensor, expected: Tensor, what: str, bound: float = FLOAT32) -> None:
    """Raise an ``AssertionError`` unless the error is within ``bound`` times the largest expected element."""
    hold(actual.shape == expected.shape, f"{what} has shape {tuple(actual.shape)}, expected {tuple(expected.shape)}")
    if not expected.numel():
        return
    error = (actual.double() - expected.double()).abs().max().item()
    largest = expected.double().abs().max().item()
    hold(error <= bound * largest, f"{what} is off by {error:.2e}, its largest element is {largest:.2e}")


def step(layer: MoE, x: Tensor, context: RoutingContext | None, run: Any = None, seed: int = 7) -> dict[str, Tensor]:
    """Return one step's output, auxiliary loss, loads and gradients, from the same random numbers each time."""
    layer.zero_grad()
    x = x.detach().clone().requires_grad_()
    with seeded(seed), record(layer) as tape:
        y = (layer if run is None else run)(x, context)
    weight = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(seed))
    (entry,) = tape.entries
    loss = aux_loss(tape)
    ((y * weight).sum() + loss).backward()
    results = {"output": y.detach(), "auxiliary loss": loss.detach(), "load": entry.routing.tokens_per_expert_E}
    grads = {"tokens": x, **dict(layer.named_parameters())}
    return results | {f"gradient of {n}": p.grad.clone() for n, p in grads.items() if p.grad is not None}


def tensors(routing: Decision) -> dict[str, Tensor]:
    """Return the tensors of a routing and its evidence, by name."""
    return {k: v for part in (routing, routing.evidence) for k, v in vars(part).items() if isinstance(v, Tensor)}


def same_step(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    hold(actual.keys() == expected.keys(), f"there are {sorted(actual)}, expected {sorted(expected)}")
    for name, value in expected.items():
        close(actual[name], value, name)
