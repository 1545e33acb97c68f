"""``torch.nn.functional.grouped_mm`` in a custom op: the path on CUDA without Triton.

``grouped_mm`` by itself does not survive ``torch.compile`` or export in float32, rejects rows that are not multiples of
16 bytes, and leaves garbage in the rows past the last offset. The op here mends the three.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .eager import (
    ALL_ACTIVATIONS,
    FFNWeights,
    RowIndex,
    accumulate_dtype,
    check_shapes,
    check_width,
    combine,
    is_full,
    queue_ranks,
    sort_pairs,
    topk_gate,
)
from .quantized import QuantizedWeight, Weight

_FEW = 32
"""Most experts whose biases are added block by block on a CPU."""


def supports(device: torch.device, dtype: torch.dtype) -> bool:
    return device.type in ("cpu", "cuda") and dtype in (torch.float32, torch.bfloat16, torch.float16)


def _aligned(t: Tensor) -> Tensor:
    """Return ``t`` contiguous, its last dimension padded to whole 16-byte units with zeros."""
    unit = 16 // t.element_size()
    missing = -t.shape[-1] % unit
    return F.pad(t, (0, missing)) if missing else t.contiguous()


def _zero_tail(y_R: Tensor, offsets_E: Tensor) -> Tensor:
    if y_R.device.type == "cpu":  # a look at the last offset costs nothing
        y_R[int(offsets_E[-1]) :] = 0
        return y_R
    live_R = torch.arange(y_R.shape[0], device=y_R.device) < offsets_E[-1]
    return y_R.masked_fill_(~live_R[:, None], 0)  # fill, not multiply: the tail may be NaN


@torch.library.custom_op("moesaic::grouped_mm", mutates_args=())
def grouped_mm(x_R: Tensor, w: Tensor, offsets_E: Tensor) -> Tensor:
    """``y_r = x_r w_e`` for the rows ``r`` of expert ``e``; zero past the last offset.

    Args:
        x_R: (R, D) rows sorted by expert.
        w: (E, D, F).
        offsets_E: int32 (E,), inclusive.

    Raises:
        ValueError: rows are not D wide.
    """
    check_width(x_R, w.shape[1])
    if x_R.shape[0] == 0:
        return x_R.new_empty(0, w.shape[-1])
    x_R, w, width = _aligned(x_R), _aligned(w), w.shape[-1]
    if w.shape[1] != x_R.shape[1]:
        w = F.pad(w, (0, 0, 0, x_R.shape[1] - w.shape[1]))
    y_R = F.grouped_mm(x_R, w, offs=offsets_E)
    return _zero_tail(y_R, offsets_E)[:, :width].contiguous()


@torch.library.custom_op("moesaic::grouped_mm_dw", mutates_args=())
def grouped_mm_dw(x_R: Tensor, dy_R: Tensor, offsets_E: Tensor) -> Tensor:
    """``dw_e = x^T dy`` over the rows of expert ``e``, (E, D, F)."""
    E, D, width = offsets_E.shape[0], x_R.shape[1], dy_R.shape[1]
    if x_R.shape[0] == 0:
        return x_R.new_zeros(E, D, width)
    # Rows past the last offset belong to no group and are not read.
    x_R, dy_R = _aligned(x_R), _aligned(dy_R)
    return F.grouped_mm(x_R.t(), dy_R, offs=offsets_E)[:, :D, :width].contiguous()


@grouped_mm.register_fake
def _(x_R, w, offsets_E):
    return x_R.new_empty(x_R.shape[0], w.shape[-1])


@grouped_mm_dw.register_fake
def _(x_R, dy_R, offsets_E):
    return x_R.new_empty(offsets_E.shape[0], x_R.shape[1], dy_R.shape[1])


def _setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, dy_R):
    x_R, w, offsets_E = ctx.saved_tensors
    dx_R = grouped_mm(dy_R.contiguous(), w.transpose(1, 2), offsets_E) if ctx.needs_input_grad[0] else None
    dw = grouped_mm_dw(x_R, dy_R.contiguous(), offsets_E) if ctx.needs_input_grad[1] else None
    return dx_R, dw, None


grouped_mm.register_autograd(_backward, setup_context=_setup)


def _dw_backward(ctx, ddw):
    x_R, dy_R, offsets_E = ctx.saved_tensors
    dx_R = grouped_mm(dy_R.contiguous(), ddw.transpose(1, 2), offsets_E) if ctx.needs_input_grad[0] else None
    ddy_R = grouped_mm(x_R.contiguous(), ddw, offsets_E) if ctx.needs_input_grad[1] else None
    return dx_R, ddy_R, None


# The gradient of a weight may itself be differentiated, as in a gradient penalty.
grouped_mm_dw.register_autograd(_dw_backward, setup_context=_setup)


@torch.library.custom_op("moesaic::quantized_mm", mutates_args=())
def quantized_mm(x_R: Tensor, values: Tensor, scales: Tensor, fan_in: int, offsets_E: Tensor) -> Tensor:
    """``y_r = x_r w_e`` by the quantized matrix of expert ``e``; zero past the last offset.

    On a CPU only the matrices of experts that have rows are dequantized, one at a time. Elsewhere all are, so that the
    host need not wait for the counts.

    Args:
        x_R: (R, K) rows sorted by expert.
        values, scales, fan_in: as in ``QuantizedWeight``.
        offsets_E: int32 (E,), inclusive.

    Raises:
        ValueError: rows are not ``fan_in`` wide, or scales or offsets have another number of experts.
    """
    w = QuantizedWeight(values, scales, fan_in, x_R.dtype)
    check_width(x_R, fan_in)
    check_shapes(offsets_E=(offsets_E, values.shape[:1]), scales=(scales, (len(values), *scales.shape[1:])))
    if x_R.device.type != "cpu":
        return grouped_mm(x_R, w.dequantized(), offsets_E)
    y_R, start = x_R.new_zeros(x_R.shape[0], w.shape[2]), 0
    for e, end in enumerate(offsets_E.tolist()):
        if start < end:
            y_R[start:end] = x_R[start:end] @ w[e]
        start = end
    return y_R


@quantized_mm.register_fake
def _(x_R, values, scales, fan_in, offsets_E):
    return x_R.new_empty(x_R.shape[0], scales.shape[2])


def product(x_R: Tensor, w: Weight, offsets_E: Tensor) -> Tensor:
    """``y_r = x_r w_e`` for the rows of expert ``e``, by its quantized matrix if it has one; zero past the last."""
    if isinstance(w, QuantizedWeight):
        y_R: Tensor = quantized_mm(x_R, w.values, w.scales, w.fan_in, offsets_E)
    else:
        y_R = grouped_mm(x_R, w, offsets_E)
    return y_R


def _bias_rows(bias: Tensor, expert_R: Tensor) -> Tensor:
    """Return the bias of each row, (R, F). Its gradient is a sum over rows, which is kept in float32."""
    return bias.to(accumulate_dtype(bias.dtype)).index_select(0, expert_R).to(bias.dtype)


def expert_of_rows(rows: Tensor, offsets_E: Tensor) -> Tensor:
    """Return the expert of each of the (R, ...) rows, int64 (R,); E past the last offset."""
    return torch.bucketize(torch.arange(rows.shape[0], device=rows.device), offsets_E, right=True)


class _AddBias(torch.autograd.Function):
    """Adds the bias of each expert to its rows, block by block: sums over a block are ten times as fast as adding up
    its rows by their index."""

    @staticmethod
    def forward(ctx: Any, y_RF: Tensor, b: Tensor, ends: list[int]) -> Tensor:
        ctx.blocks = list(pairwise((0, *ends)))
        return torch.cat([y_RF[start:end] + b[e] for e, (start, end) in enumerate(ctx.blocks)])

    @staticmethod
    def backward(ctx: Any, dy_RF: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        return dy_RF, torch.stack([dy_RF[start:end].sum(0) for start, end in ctx.blocks]), None


def expert_linear(x_RD: Tensor, w: Weight, offsets_E: Tensor, b: Tensor | None = None) -> Tensor:
    """Compute ``eager.expert_linear`` in one grouped matmul."""
    y_RF = product(x_RD, w, offsets_E)
    return y_RF if b is None else add_bias(y_RF, b, offsets_E)


def add_bias(y_RF: Tensor, b: Tensor, offsets_E: Tensor) -> Tensor:
    """Add the bias (E, F) of its expert to each row; rows past the last offset are zero."""
    if b.shape[0] <= _FEW and b.dtype == accumulate_dtype(b.dtype) and is_full(y_RF, offsets_E):
        y: Tensor = _AddBias.apply(y_RF, b, offsets_E.tolist())
        return y
    expert_R = expert_of_rows(y_RF, offsets_E)
    y_RF = y_RF + _bias_rows(b, expert_R.clamp_max(b.shape[0] - 1))
    return y_RF.masked_fill((expert_R == b.shape[0])[:, None], 0)


def expert_ffn(
    x: Tensor,
    rows: RowIndex,
    gates_R: Tensor,
    weights: FFNWeights,
    activation: str,
    product: Callable[[Tensor, Any, Tensor], Tensor] = product,
) -> Tensor:
    """Compute ``eager.expert_ffn`` in grouped matmuls over rows gathered once.

    Args:
        product: computes each matmul.
    """
    act, (w_in, w_out, b_in, b_out, w_gate) = ALL_ACTIVATIONS[activation], weights
    index_R, offsets_E = rows.row_index_R, rows.offsets_E
    x_R = x if index_R is None else x.index_select(0, index_R)
    live_R = torch.arange(x_R.shape[0], device=x.device) < offsets_E[-1]
    gates = torch.where(live_R, gates_R, 0).to(x.dtype)[:, None]
    expert_R = expert_of_rows(x_R, offsets_E).clamp_max(w_in.shape[0] - 1)
    h = product(x_R, w_in, offsets_E)
    if b_in is not None:
        h = h + _bias_rows(b_in, expert_R)
    h = act(h) if w_gate is None else act(product(x_R, w_gate, offsets_E)) * h
    y_R = product(h * gates, w_out, offsets_E)
    if b_out is not None:
        y_R = y_R + _bias_rows(b_out, expert_R) * gates
    if index_R is None:
        return y_R
    if rows.inverse_N is not None and rows.top_k is not None:
        # Token-major pairs: a gather and a sum, no atomics, the same bits every time.
        y_TKD = y_R.index_select(0, rows.inverse_N).unflatten(0, (x.shape[0], rows.top_k))
        return y_TKD.sum(1, dtype=accumulate_dtype(x.dtype)).to(x.dtype)
    return combine(y_R, rows, None, x.shape[0]).to(x.dtype)


__all__ = [
    "combine",
    "expert_ffn",
    "expert_linear",
    "expert_of_rows",
    "queue_ranks",
    "sort_pairs",
    "supports",
    "topk_gate",
]
