"""Gradients that are sparse tensors of rows, as in ``PEER(row_sparse=True)``: who takes them, and their clipping.

torch's own clipping has no kernel for them, and its optimizers reject them one by one, without a remedy.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from core.optim import coalesced


def row_sparse_module(model: nn.Module) -> str | None:
    """Return the name of a module of ``model`` whose gradients are sparse tensors of rows; None if there is none."""
    for name, module in model.named_modules():
        is_table = isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.sparse
        if is_table or getattr(module, "row_sparse", False):
            return name
    return None


def check_processes(model: nn.Module, world_size: int) -> None:
    """Raise an error for experts with sparse gradients on several processes, which DDP only sums for tables of ``nn``.

    Raises:
        ValueError: naming the experts and the remedy.
    """
    sparse = [name for name, module in model.named_modules() if getattr(module, "row_sparse", False)]
    if sparse and world_size > 1:
        raise ValueError(
            f"row_sparse=True of {sparse[0]} is for one process, and this run has {world_size}: set row_sparse to false"
        )


def clip_with_rows(parameters: Iterable[Tensor], limit: float, algorithm: str) -> bool:
    """Clip the gradients of parameters, some of which are sparse tensors of rows, as torch clips dense ones.

    Args:
        parameters: the optimizer's parameters.
        limit: the largest norm of all gradients together, or the largest size of one number.
        algorithm: "norm" or "value".

    Returns:
        whether it has clipped: False where no gradient is sparse, and torch's own clipping does it.
    """
    given = [p for p in parameters if p.grad is not None]
    if not any(p.grad.is_sparse for p in given if p.grad is not None):
        return False
    with torch.no_grad():
        grads = [_numbers(p) for p in given]
        if algorithm == "value":
            torch._foreach_clamp_min_(grads, -limit)
            torch._foreach_clamp_max_(grads, limit)
        else:
            total = torch.nn.utils.get_total_norm(grads)
            torch._foreach_mul_(grads, (limit / (total + 1e-6)).clamp(max=1.0))
    return True


def _numbers(parameter: Tensor) -> Tensor:
    """Return the numbers that the gradient stores: a row that was picked twice is summed before."""
    assert parameter.grad is not None
    if not parameter.grad.is_sparse:
        return parameter.grad
    parameter.grad = coalesced(parameter.grad)
    return parameter.grad._values()
