"""Matmuls of float32 matrices on CPUs that torch's own library serves badly.

torch gives them to MKL, which uses AVX-512 only on Intel's processors; oneDNN, which comes with torch too and computes
its half-precision matmuls, uses it on every processor that has it. One core of an AMD EPYC of 2025, GFLOP/s (MKL,
oneDNN):

    160 x 128 x 8000      51   139          forward of 512 x 512 x 256      53   136
    160 x 128 x 128       74   115          its gradient of the input       58   131
     20 x 128 x 256       56    45          its gradient of the weight      51   105

So matmuls of ``LEAST`` multiplications and ``FEWEST_ROWS`` rows or more go to oneDNN there. It compiles a kernel for
each new shape (0.5 ms) and keeps a thousand. At each matmul it copies the weight to a layout of its own, which
``packed`` does once for many: 5 x 512 x 10000 takes 0.13 ms instead of 0.52, on two cores, and 160 x 128 x 8000 0.69
instead of 0.78. ``torch.backends.mkldnn.flags(enabled=False)`` turns it off, as for all of torch. Both sum in float32;
they differ by rounding.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...torch_internals import is_traced, onednn
from ..quantized import Weight, scale_
from .pages import new_empty

LEAST = 2**20
"""Multiplications of the smallest product that oneDNN is faster at: at 0.66 million both take as long."""
FEWEST_ROWS = 4
"""Rows of the smallest product that oneDNN is faster at with a weight that is not packed: below, its copy of the weight
takes longer than MKL's product, which reads the weight once (1 x 1024 x 2048 on one Intel core: 1.3 and 0.5 ms)."""
LEAST_PACKED = 2**18
"""Multiplications of the smallest product that oneDNN is faster at with a packed weight."""
LEAST_WEIGHT = 2**18
"""Numbers of the smallest weight that is packed, which takes as long as it saves in ten products of few rows."""
MOST_PACKED = 2**28
"""Most numbers that are packed at once: copies of 1 GB."""


@dataclass
class _Packed:
    """A weight and its copy. The weight is kept alive, so that no other gets its ``id``."""

    weight: Tensor
    copy: Tensor
    users: int = 0


_packed: dict[int, _Packed] = {}
_lock = threading.Lock()


@functools.cache
def is_served_badly() -> bool:
    """Return whether MKL leaves the AVX-512 of this processor unused, and torch has the other way."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkl.is_available():
        return False
    return cpu_field("vendor_id") == "AuthenticAMD" and onednn("linear_pointwise") is not None


def cpu_field(name: str) -> str:
    """Return what Linux says of the processor under this name, such as "model name", or ""."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "")


def _is_for_onednn(x: Tensor, weight: Tensor, width: int) -> bool:
    """Return whether oneDNN is to multiply ``x`` by a weight that leads to ``width`` numbers."""
    if not is_served_badly():
        return False
    is_packed = id(weight) in _packed
    return (
        x.numel() * width >= (LEAST_PACKED if is_packed else LEAST)
        and (is_packed or x.numel() >= FEWEST_ROWS * x.shape[-1])
        and x.dtype == weight.dtype == torch.float32
        and x.device.type == weight.device.type == "cpu"
        and bool(torch.backends.mkldnn.enabled)
    )


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Multiply (M, K) by (N, K) to (M, N), of any strides."""
    # oneDNN reads a bias as if its numbers stood side by side.
    bias = None if bias is None else bias.contiguous()
    entry = _packed.get(id(weight))
    weight = weight if entry is None else entry.copy
    y: Tensor = onednn("linear_pointwise")(x, weight, bias, "none", [], "")
    return y


def mm(a: Tensor, b: Tensor, *, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """``a @ b + bias`` of (M, K) and (K, N), without a gradient: for custom ops."""
    if _is_for_onednn(a, b, b.shape[1]):
        y = _onednn(a, b.t(), bias)
        return y if out is None else out.copy_(y)
    return torch.mm(a, b, out=out) if bias is None else torch.addmm(bias, a, b, out=out)


def expert_mm(a: Tensor, w: Weight, e: int, *, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """``a @ w[e] + bias``, without a gradient as in ``mm``.

    A quantized matrix is dequantized in memory that is kept for the next. If it has one scale per channel the rows are
    scaled instead, for they are fewer in decoding.
    """
    if isinstance(w, Tensor):
        return mm(a, w[e], bias=bias, out=out)
    matrix = new_empty(a, w.shape[1:])
    w.write_whole_numbers(e, matrix)
    if not w.is_by_channel:
        return mm(a, scale_(matrix, w.scales[e]), bias=bias, out=out)
    y = mm(a, matrix, out=out).mul_(w.scales[e])
    return y if bias is None else y.add_(bias)


def addmm_(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Compute ``total += a @ b``, without a gradient as in ``mm``; ``total`` may be of a wider dtype."""
    if total.dtype != a.dtype or _is_for_onednn(a, b, b.shape[1]):
        return total.add_(mm(a, b))
    return total.addmm_(a, b)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _onednn(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        flat_x, flat_dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
        return (
            linear(dy, weight.t()) if wants_x else None,
            linear(flat_dy.t(), flat_x.t()) if wants_weight else None,
            flat_dy.sum(0) if wants_bias else None,
        )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear``: (..., K) and (N, K) to (..., N), with all its derivatives."""
    if torch.compiler.is_compiling() or not _is_for_onednn(x, weight, weight.shape[0]):
        return F.linear(x, weight, bias)
    if (
        torch.is_autocast_enabled("cpu")
        or is_traced(x, weight, bias)
        or not (weight.ndim == 2 and x.shape[-1] == weight.shape[1])  # torch reports the error
        or not (bias is None or bias.shape == weight.shape[:1])
    ):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)):
        y: Tensor = _Linear.apply(x, weight, bias)
        return y
    return _onednn(x, weight, bias)


@contextlib.contextmanager
def packed(*weights: Tensor) -> Iterator[None]:
    """Let ``linear`` multiply by copies of these (N, K) weights in oneDNN's layout, for many matmuls of few rows.

    Weights that gain by it are copied, up to 1 GB. They must not change inside the ``with`` block. Nothing happens if
    oneDNN does not compute the matmuls, or gradients are on. Several threads may be inside, with the same weights too.
    """
    wanted = {} if torch.is_grad_enabled() or not is_served_badly() else {id(w): w for w in weights if _gains(w)}
    held = []
    with _lock:
        room = MOST_PACKED - sum(entry.weight.numel() for entry in _packed.values())
        for number, weight in wanted.items():
            if number not in _packed and weight.numel() <= room:
                room -= weight.numel()
                _packed[number] = _Packed(weight, onednn("reorder_linear_weight")(weight.detach()))
            if number in _packed:
                _packed[number].users += 1
                held.append(number)
    try:
        yield
    finally:
        with _lock:
            for number in held:
                _packed[number].users -= 1
                if not _packed[number].users:
                    del _packed[number]


def _gains(weight: Tensor) -> bool:
    return (
        not is_traced(weight)
        and (weight.ndim, weight.dtype, weight.device.type) == (2, torch.float32, "cpu")
        and weight.numel() >= LEAST_WEIGHT
    )


class Linear(nn.Linear):
    """``nn.Linear`` by ``linear``: dense layers as fast as experts, so that a comparison of the two is fair."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


def convert_linear(module: nn.Module) -> None:
    """Make every ``nn.Linear`` of ``module`` a ``Linear``, in place: parameters, names and hooks stay."""
    for part in module.modules():
        if type(part) is nn.Linear:
            part.__class__ = Linear
