"""Tools for the tests of the fused kernels: a list of the operations that torch runs, and a gradient of None."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Operations(TorchDispatchMode):
    """The names of the operations that run inside the block, without views and uninitialized memory.

    ``zeros`` has the shapes of tensors of zeros. An operation of our own is one name, whatever it runs.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.zeros: list[torch.Size] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, out = op.overloadpacket.__name__, op(*args, **(kwargs or {}))
        if not op.is_view and "empty" not in name:
            self.names.append(name)
        if "zero" in name and isinstance(out, Tensor):
            self.zeros.append(out.shape)
        return out


class Severed(torch.autograd.Function):
    """A function that returns its input and has no gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        return None


class Calls(TorchDispatchMode):
    """The first call of each of our custom ops with these arguments given: the op, its arguments, and named ones."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[tuple[str, ...], tuple[Any, Any, Any]] = {}

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op.namespace == "moesaic":
            self.calls.setdefault((op.name(), *(str(a is None) for a in args)), (op, args, kwargs or {}))
        return op(*args, **(kwargs or {}))
