"""Checks of a layer compiled and exported."""

from __future__ import annotations

import torch
from torch import Tensor

from ..contract import RoutingContext
from .check import Checks, close
from .router_case import FIELDS, SIZES, RouterCase

CHECKS: Checks[RouterCase] = Checks()


@CHECKS.keeps("torch.export goes through, for any number of tokens")
def _(case: RouterCase) -> None:
    names = ["valid_BS", *(n for n in FIELDS if n in case.router.needs or hasattr(case.router, SIZES[n]))]
    layer = case.layer()

    def inputs(B: int, S: int) -> tuple[Tensor, RoutingContext]:
        valid_BS = torch.arange(S) < torch.arange(S, S - B, -1)[:, None]
        context = case.context(B, S, valid_BS=valid_BS)
        return case.tokens(B, S), RoutingContext(**{name: getattr(context, name) for name in names})

    dynamic = torch.export.Dim.DYNAMIC  # raises where a size is fixed; a gate may ask for a least length
    # The shapes of the fields that are set, in their order.
    of_fields = [{0: dynamic, 1: dynamic} if n.endswith("BS") else {0: dynamic} for n in names]
    shapes = {"x": {0: dynamic, 1: dynamic}, "context": of_fields}
    program = torch.export.export(layer, inputs(3, 6), dynamic_shapes=shapes).module()
    for B, S in ((3, 6), (2, 7)):
        close(program(*inputs(B, S)), layer(*inputs(B, S)), f"the output of {B} sequences of {S} tokens")
