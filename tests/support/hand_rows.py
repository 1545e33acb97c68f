"""Three rows of two experts, whose sums one can check by hand."""

from __future__ import annotations

import torch
from torch import Tensor

from core import Experts, Rows


def rows(gathered: bool) -> Rows:
    """Return three rows of two experts: tokens 0 and 1 take expert 0, token 0 takes expert 1; one place is empty."""
    x, index = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([0, 1, 0, 1])
    given = Rows(x, index, torch.tensor([2, 3], dtype=torch.int32), torch.tensor([0.5, 1.0, 0.25, 9.0]), 2)
    return given.materialized() if gathered else given


def summed(experts: Experts, gathered: bool) -> Tensor:
    """Return the tokens after the experts, weighted and summed."""
    given = rows(gathered)
    out = experts(given)
    if out.combined:
        return out.x
    y = torch.zeros(2, out.x.shape[1])
    for r in range(3):
        y[given.row_index_R[r]] += out.x[r] * (1.0 if out.weighted else out.gates_R[r])
    return y
