"""Functions that tell when ``torch.func``, forward-mode differentiation or a tracer is at work.

A custom op has a backward of its own and nothing else: ``torch.func.jvp`` of one is zero without a word, and
``torch.func.grad`` or ``torch.autograd.forward_ad`` end inside torch. The oracle is made of torch's own operations.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad


def is_transformed() -> bool:
    """Return whether a transform of ``torch.func`` or forward-mode differentiation is under way."""
    # Not peek_interpreter_stack(), which is never None to torch.compile.
    return torch._C._functorch.maybe_current_level() is not None or forward_ad._current_level >= 0


def is_traced(*tensors: Tensor | None) -> bool:
    """Return whether a transform, a tracer or a subclass of ``Tensor`` needs to see torch's operations."""
    return (
        is_transformed()
        or torch.jit.is_tracing()
        or not all(type(t) in (Tensor, nn.Parameter) for t in tensors if t is not None)
    )


def is_watched(*tensors: Tensor | None) -> bool:
    """Return whether anything sees which operations run: a compiler, a mode such as a FLOP counter, a tracer."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0 or is_traced(*tensors)


def check_not_mapped(ids: Tensor) -> None:
    """Raise a ``ValueError`` where ``torch.func.vmap`` maps over a choice of experts: each would have other counts."""
    if torch.compiler.is_compiling() or torch._C._functorch.maybe_current_level() is None:
        return
    while torch._C._functorch.is_functorch_wrapped_tensor(ids):
        if torch._C._functorch.is_batchedtensor(ids):
            raise ValueError("torch.func.vmap cannot map over a routing, whose counts differ: give the layer the batch")
        ids = torch._C._functorch.get_unwrapped(ids)
