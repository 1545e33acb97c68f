"""Who computes under ``torch.func`` and forward-mode differentiation.

A custom op has a backward of its own and nothing else: ``torch.func.jvp`` of one is zero without a word, and
``torch.func.grad`` or ``torch.autograd.forward_ad`` end inside torch. The oracle is made of torch's own operations.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad


def is_transformed() -> bool:
    """Whether a transform of ``torch.func`` or forward-mode differentiation is under way."""
    # Not peek_interpreter_stack(), which is never None to torch.compile.
    return torch._C._functorch.maybe_current_level() is not None or forward_ad._current_level >= 0


def check_not_mapped(ids: Tensor) -> None:
    """Raise a ``ValueError`` where ``torch.func.vmap`` maps over a choice of experts: each would have other counts."""
    if torch.compiler.is_compiling() or torch._C._functorch.maybe_current_level() is None:
        return
    while torch._C._functorch.is_functorch_wrapped_tensor(ids):
        if torch._C._functorch.is_batchedtensor(ids):
            raise ValueError("torch.func.vmap cannot map over a routing, whose counts differ: give the layer the batch")
        ids = torch._C._functorch.get_unwrapped(ids)
