"""Quantized experts over their rows, forward only: their matrices are dequantized inside the matmuls.

They are read from memory as they are stored, a quarter or an eighth of float32, and no floating-point copy is written.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor

from .. import grouped
from ..eager import FFNWeights, RowIndex, check_ffn, check_shapes, check_width
from ..fallback import warn_once
from ..quantized import QuantizedWeight, Weight
from . import products
from .environment import MAX_EXPERTS
from .launch import dense
from .sums import order_of, sum_rows


@torch.library.custom_op("moesaic::triton_quantized_ffn", mutates_args=())
def _quantized_ffn(
    x: Tensor,
    row_index_R: Tensor | None,
    offsets_E: Tensor,
    gates_R: Tensor,
    in_values: Tensor,
    in_scales: Tensor,
    out_values: Tensor,
    out_scales: Tensor,
    gate_values: Tensor | None,
    gate_scales: Tensor | None,
    b_in: Tensor | None,
    b_out: Tensor | None,
    rows: Tensor | None,
    starts: Tensor | None,
    hidden_dim: int,
    top_k: int,
    activation: str,
) -> Tensor:
    x, gates_R, b_in, b_out = dense(x, gates_R, b_in, b_out)
    row_index_R, offsets_E, rows, starts = dense(row_index_R, offsets_E, rows, starts)
    D, kind = x.shape[1], x.dtype
    in_values, in_scales, out_values, out_scales = dense(in_values, in_scales, out_values, out_scales)
    gate_values, gate_scales = dense(gate_values, gate_scales)
    w_in = QuantizedWeight(in_values, in_scales, D, kind)
    w_out = QuantizedWeight(out_values, out_scales, hidden_dim, kind)
    has_gate = gate_values is not None and gate_scales is not None
    w_gate = QuantizedWeight(gate_values, gate_scales, D, kind) if has_gate else None
    R = gates_R.shape[0]
    if R == 0:
        return x.new_zeros(x.shape[0], out_scales.shape[2])
    hidden, _, _ = products.up(x, row_index_R, offsets_E, w_in, w_gate, b_in, activation, R, keep=False)
    return down(hidden, x, row_index_R, offsets_E, gates_R, w_out, b_out, rows, starts, top_k)


@_quantized_ffn.register_fake
def _(x, row_index_R, offsets_E, gates_R, in_values, in_scales, out_values, out_scales, *rest):
    return x.new_empty(x.shape[0], out_scales.shape[2])


@torch.library.custom_op("moesaic::triton_quantized_linear", mutates_args=())
def _quantized_linear(
    x_RD: Tensor, values: Tensor, scales: Tensor, fan_in: int, offsets_E: Tensor, b: Tensor | None
) -> Tensor:
    check_width(x_RD, fan_in)
    y = x_RD.new_empty(x_RD.shape[0], scales.shape[2])
    if y.numel():
        x_RD, values, scales, offsets_E, b = dense(x_RD, values, scales, offsets_E, b)
        w = QuantizedWeight(values, scales, fan_in, x_RD.dtype)
        products.linear(x_RD, w, offsets_E, y, bias=b, clear=True)
    return y


@_quantized_linear.register_fake
def _(x_RD, values, scales, fan_in, offsets_E, b):
    return x_RD.new_empty(x_RD.shape[0], scales.shape[2])


def expert_ffn(x: Tensor, rows: RowIndex, gates_R: Tensor, weights: FFNWeights, activation: str) -> Tensor:
    """Compute ``eager.expert_ffn`` by quantized matrices.

    Raises:
        ValueError: shapes that do not go together, or an unknown activation.
    """
    w_in, w_out = cast(QuantizedWeight, weights.w_in), cast(QuantizedWeight, weights.w_out)
    w_gate = cast("QuantizedWeight | None", weights.w_gate)
    check_width(x, w_in.shape[1])
    check_ffn(x, rows, gates_R, weights, activation)
    if beyond(w_in, w_out):
        return grouped.expert_ffn(x, rows, gates_R, weights, activation)
    order, starts, k = order_of(rows, x.shape[0])
    y: Tensor = _quantized_ffn(
        x,
        rows.row_index_R,
        rows.offsets_E,
        gates_R,
        w_in.values,
        w_in.scales,
        w_out.values,
        w_out.scales,
        None if w_gate is None else w_gate.values,
        None if w_gate is None else w_gate.scales,
        weights.b_in,
        weights.b_out,
        order,
        starts,
        w_in.shape[-1],
        k,
        activation,
    )
    return y


def expert_linear(x_RD: Tensor, w: QuantizedWeight, offsets_E: Tensor, b: Tensor | None = None) -> Tensor:
    """Compute ``eager.expert_linear`` by quantized matrices.

    Raises:
        ValueError: rows not as wide as the matrices take them, or a bias or offsets of another shape.
    """
    check_shapes(b=(b, (w.shape[0], w.shape[2])), offsets_E=(offsets_E, (w.shape[0],)))
    if beyond(w):
        return grouped.expert_linear(x_RD, w, offsets_E, b)
    y: Tensor = _quantized_linear(x_RD, w.values, w.scales, w.fan_in, offsets_E, b)
    return y


def down(
    hidden: Tensor,
    x: Tensor,
    row_index_R: Tensor | None,
    offsets_E: Tensor,
    gates_R: Tensor,
    w_out: Weight,
    b_out: Tensor | None,
    rows: Tensor | None,
    starts: Tensor | None,
    top_k: int,
) -> Tensor:
    """Return the sum over each token's rows of the gated second matmul, (T, N)."""
    direct = row_index_R is None or top_k == 1
    # Rows and tokens that no expert computes are zero.
    y = x.new_zeros(x.shape[0], w_out.shape[-1]) if direct else x.new_empty(len(gates_R), w_out.shape[-1])
    index_R = row_index_R if direct else None
    products.linear(hidden, w_out, offsets_E, y, bias=b_out, gates_R=gates_R, row_index_R=index_R)
    if direct:
        return y
    assert rows is not None
    return sum_rows(y, rows, starts, offsets_E, None, x.shape[0], top_k, x.dtype)


def beyond(*weights: Weight) -> bool:
    """Return whether weights pass the kernels' limits: experts that a tile looks at, 32-bit places in a matrix."""
    for E, *matrix in (w.shape for w in weights):
        if E > MAX_EXPERTS:
            warn_once(f"backend='triton' takes at most {MAX_EXPERTS} experts, not {E}: using 'grouped'")
            return True
        if math.prod(matrix) >= 2**31:
            warn_once(f"backend='triton' takes matrices below 2**31 numbers, not {math.prod(matrix)}: using 'grouped'")
            return True
    return False
