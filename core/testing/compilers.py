"""A layer compiled and exported."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..contract import RoutingContext
from ..layers import MoE
from .case import FIELDS, SIZES, Case
from .check import Checks, close, same_step, step

CHECKS = Checks()


@CHECKS.keeps("torch.compile goes through without a graph break, to the same step")
def _(case: Case) -> None:
    for training in (True, False):
        torch._dynamo.reset()
        layer = case.layer(training=training, balance=case.balance())
        x, context = case.padded()
        expected = step(layer, x, context)
        try:
            same_step(step(layer, x, context, run=torch.compile(layer, backend="eager", fullgraph=True)), expected)
        finally:
            torch._dynamo.reset()


class _Flat(nn.Module):
    """A layer whose context is given as plain tensors: what ``torch.export`` takes."""

    def __init__(self, layer: MoE, names: list[str]) -> None:
        super().__init__()
        self.layer, self.names = layer, names

    def forward(self, x: Tensor, *values: Tensor) -> Tensor:
        return self.layer(x, RoutingContext(**dict(zip(self.names, values, strict=True))))


@CHECKS.keeps("torch.export goes through, for any number of tokens")
def _(case: Case) -> None:
    names = ["valid_BS", *(n for n in FIELDS if n in case.router.needs() or hasattr(case.router, SIZES[n]))]
    flat = _Flat(case.layer(), names)

    def inputs(B: int, S: int) -> tuple[Tensor, ...]:
        valid_BS = torch.arange(S) < torch.arange(S, S - B, -1)[:, None]
        context = case.context(B, S, valid_BS=valid_BS)
        return case.tokens(B, S), *(getattr(context, name) for name in names)

    dynamic = torch.export.Dim.DYNAMIC  # raises where a size is fixed; a gate may ask for a least length
    of_values = tuple({0: dynamic, 1: dynamic} if n.endswith("BS") else {0: dynamic} for n in names)
    shapes = {"x": {0: dynamic, 1: dynamic}, "values": of_values}
    program = torch.export.export(flat, inputs(3, 6), dynamic_shapes=shapes).module()
    for B, S in ((3, 6), (2, 7)):
        close(program(*inputs(B, S)), flat(*inputs(B, S)), f"the output of {B} sequences of {S} tokens")
