"""Undocumented parts of torch that the engine uses: no other file of ``core`` uses any.

Each docstring says what torch lacks in public. All hold for torch 2.10 to 2.13; tests/core/test_torch_internals.py
fails if a new version changes one.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor as FakeTensor  # the tensors of a trace, whose class is not public
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_in_torch_dispatch_mode as is_in_torch_dispatch_mode

# ---- what is under way
#
# A custom op has a backward of its own and nothing else: ``torch.func.jvp`` of one is zero without a word, and
# ``torch.func.grad`` or ``torch.autograd.forward_ad`` end inside torch. The oracle is made of torch's own operations.


def is_transformed() -> bool:
    """Return whether a transform of ``torch.func`` or forward-mode differentiation is under way. Neither has a public
    function that says so."""
    # Not peek_interpreter_stack(), which is never None to torch.compile.
    return torch._C._functorch.maybe_current_level() is not None or forward_ad._current_level >= 0


def is_traced(*tensors: Tensor | None) -> bool:
    """Return whether a transform, a tracer or a subclass of ``Tensor`` needs to see torch's operations."""
    plain = all(type(t) in (Tensor, nn.Parameter) for t in tensors if t is not None)
    return is_transformed() or torch.jit.is_tracing() or not plain


def is_watched(*tensors: Tensor | None) -> bool:
    """Return whether anything sees which operations run: a compiler, a mode such as a FLOP counter, a tracer. The stack
    of modes is not public."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0 or is_traced(*tensors)


def check_not_mapped(ids: Tensor) -> None:
    """Raise a ``ValueError`` if ``torch.func.vmap`` maps over a choice of experts: each would have other counts. The
    wrappers of ``torch.func`` are not public."""
    if torch.compiler.is_compiling() or torch._C._functorch.maybe_current_level() is None:
        return
    while torch._C._functorch.is_functorch_wrapped_tensor(ids):
        if torch._C._functorch.is_batchedtensor(ids):
            raise ValueError("torch.func.vmap cannot map over a routing, whose counts differ: give the layer the batch")
        ids = torch._C._functorch.get_unwrapped(ids)


is_profiled: Callable[[], bool] = torch.autograd._profiler_enabled
"""Return whether a profiler is running, which the public profilers do not say."""


def flop_counter() -> Any:
    """Return a FLOP counter of a whole call.

    torch's tells modules apart, and fails at one that takes a view of a parameter or empty rows without a gradient.
    """
    from torch.utils.flop_counter import FlopCounterMode

    class Whole(nullcontext[None]):
        parents = frozenset({"Global"})

    counter = FlopCounterMode(display=False)
    counter.mod_tracker = Whole()  # type: ignore[assignment]
    return counter


def in_backward() -> bool:
    """Return whether a backward is running, as if an activation checkpoint repeats a forward. Autograd has no public
    function that says so."""
    return torch._C._current_graph_task_id() != -1


def mark_constant(function: Callable[..., Any]) -> None:
    """Let a compiled graph keep the result of a function. ``torch.compiler.assume_constant_result`` does the same, but
    imports the compiler: that would double the time of ``import core``."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]


# ---- tensors, layers and operations


def storage_id(tensor: Tensor) -> int:
    """Return the number of a tensor's storage while it lives. ``data_ptr`` is 0 for all on the meta device."""
    return tensor.untyped_storage()._cdata


def feed_forward(layer: nn.TransformerEncoderLayer | nn.TransformerDecoderLayer, x: Tensor) -> Tensor:
    """Return the feed-forward part of torch's transformer layer, which has no public method."""
    return layer._ff_block(x)


def onednn(name: str) -> Any:
    """Return oneDNN's operation "linear_pointwise" or "reorder_linear_weight"; None if torch is built without it.
    ``F.linear`` chooses by itself."""
    return getattr(torch.ops.mkldnn, f"_{name}", None)


def fused_attention(kind: str) -> Any:
    """Return an operation behind ``F.scaled_dot_product_attention``, which chooses by itself, such as
    "flash_attention_for_cpu"."""
    return getattr(torch.ops.aten, f"_scaled_dot_product_{kind}")


def fused_recurrent() -> Any:
    """Return cuDNN's operation behind ``nn.LSTM``, ``nn.GRU`` and ``nn.RNN``, which choose by themselves."""
    return torch.ops.aten._cudnn_rnn


# ---- processes; these imports take long


def local_place(shape: torch.Size, mesh: Any, placements: Any) -> tuple[slice, ...]:
    """Return the place of this rank's shard in the whole of a sharded tensor. ``DTensor`` does not give the offset."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    sizes, starts = compute_local_shape_and_global_offset(shape, mesh, placements)
    return tuple(slice(start, start + size) for start, size in zip(starts, sizes, strict=True))


def all_to_all(rows: Tensor, received: list[int] | None, sent: list[int] | None, group: Any) -> Tensor:
    """All-to-all of rows, with a gradient. torch's public collectives have none."""
    from torch.distributed._functional_collectives import all_to_all_single_autograd

    return all_to_all_single_autograd(rows, received, sent, group)


def one_axis(mesh: Any) -> Any:
    """Return a mesh of one axis with the ranks of all axes of another, which has no public method."""
    return mesh._flatten()
