"""The two- or three-matrix expert over its rows, and one matmul: custom ops with a backward of their own.

Forward: one launch gathers, multiplies and activates; one multiplies, adds the bias and weights by the gate; one sums
the rows of a token (with one expert per token the second writes to the token itself, and the third is skipped). Saved
activations: the tokens and the pre-activations. The gate's gradient is ``<dy w_out^T, h> + <dy, b_out>`` (arXiv
2512.14080, section 3), so the experts' outputs are not needed.

With several experts per token, rows are written where they are computed and the sum gathers them: as many bytes as when
the matmul scatters them, and its stores are whole lines.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import grouped
from ..eager import FFNWeights, RowIndex, check_ffn, check_shapes, check_width
from ..quantized import QuantizedWeight, Weight
from . import products, quantized
from .launch import dense
from .sums import order_of, sum_rows


@torch.library.custom_op("moesaic::triton_expert_ffn", mutates_args=())
def _expert_ffn(
    x: Tensor,
    row_index_R: Tensor | None,
    offsets_E: Tensor,
    gates_R: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    b_in: Tensor | None,
    b_out: Tensor | None,
    w_gate: Tensor | None,
    rows: Tensor | None,
    starts: Tensor | None,
    top_k: int,
    activation: str,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    x, w_in, w_out, gates_R, b_in, b_out, w_gate = dense(x, w_in, w_out, gates_R, b_in, b_out, w_gate)
    row_index_R, offsets_E, rows, starts = dense(row_index_R, offsets_E, rows, starts)
    check_width(x, w_in.shape[1])
    R = gates_R.shape[0]
    if R == 0:
        empty = x.new_empty(0, w_in.shape[-1])
        return x.new_zeros(x.shape[0], w_out.shape[-1]), empty, empty.clone()
    hidden, pre, pre_gate = products.up(x, row_index_R, offsets_E, w_in, w_gate, b_in, activation, R, keep)
    y = quantized.down(hidden, x, row_index_R, offsets_E, gates_R, w_out, b_out, rows, starts, top_k)
    return y, pre, pre_gate


@_expert_ffn.register_fake
def _(x, row_index_R, offsets_E, gates_R, w_in, w_out, b_in, b_out, w_gate, rows, starts, top_k, activation, keep):
    kept, width = gates_R.shape[0] if keep else 0, w_in.shape[-1]
    return (
        x.new_empty(x.shape[0], w_out.shape[-1]),
        x.new_empty(kept, width),
        x.new_empty(kept if w_gate is not None else 0, width),
    )


@torch.library.custom_op("moesaic::triton_expert_ffn_backward", mutates_args=())
def _expert_ffn_backward(
    dy: Tensor,
    x: Tensor,
    row_index_R: Tensor | None,
    offsets_E: Tensor,
    gates_R: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    b_in: Tensor | None,
    b_out: Tensor | None,
    w_gate: Tensor | None,
    rows: Tensor | None,
    starts: Tensor | None,
    pre: Tensor,
    pre_gate: Tensor,
    top_k: int,
    activation: str,
    wants: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients of x, gates, w_in, w_out, b_in, b_out and w_gate.

    ``wants`` has an entry for each but the gates; a gradient that is not wanted is empty.
    """
    R = gates_R.shape[0]
    if R == 0:
        inputs = zip((x, w_in, w_out, b_in, b_out, w_gate), wants, strict=True)
        zeros = [t.new_zeros(t.shape) if wanted and t is not None else x.new_empty(0) for t, wanted in inputs]
        return zeros[0], torch.zeros_like(gates_R), zeros[1], zeros[2], zeros[3], zeros[4], zeros[5]
    dy, x, w_in, w_out, gates_R, b_out, w_gate = dense(dy, x, w_in, w_out, gates_R, b_out, w_gate)
    row_index_R, offsets_E, rows, starts, pre, pre_gate = dense(row_index_R, offsets_E, rows, starts, pre, pre_gate)
    dpre, dpre_gate, weighted, dgates_R = products.hidden_grad(
        dy, row_index_R, offsets_E, gates_R, w_out, b_out, pre, None if w_gate is None else pre_gate, activation
    )
    dx, dw_in, dw_out, db_in, db_out, dw_gate = (x.new_empty(0) for _ in wants)
    wanted_x, wanted_in, wanted_out, wanted_b_in, wanted_b_out, wanted_gate = wants
    if wanted_out:
        dw_out = products.weight_grad(weighted, dy, offsets_E, right_index_R=row_index_R)
    del weighted
    if wanted_in:
        dw_in = products.weight_grad(x, dpre, offsets_E, left_index_R=row_index_R)
    if wanted_gate:
        dw_gate = products.weight_grad(x, dpre_gate, offsets_E, left_index_R=row_index_R)
    if wanted_b_in:
        db_in = products.column_sums(dpre, offsets_E).to(x.dtype)
    if wanted_b_out:
        db_out = products.column_sums(dy, offsets_E, gates_R, row_index_R).to(x.dtype)
    if not wanted_x:
        return dx, dgates_R, dw_in, dw_out, db_in, db_out, dw_gate
    direct = row_index_R is None or top_k == 1
    dx = torch.zeros_like(x) if direct else x.new_empty(R, x.shape[1])
    products.linear(
        dpre,
        w_in,
        offsets_E,
        dx,
        transposed=True,
        second=None if w_gate is None else (dpre_gate, w_gate),
        row_index_R=row_index_R if direct else None,
    )
    if not direct:
        assert rows is not None
        dx = sum_rows(dx, rows, starts, offsets_E, None, x.shape[0], top_k, x.dtype)
    return dx, dgates_R, dw_in, dw_out, db_in, db_out, dw_gate


@_expert_ffn_backward.register_fake
def _(dy, x, row_index_R, offsets_E, gates_R, w_in, w_out, b_in, b_out, w_gate, *rest):
    *_, wants = rest
    inputs = zip((x, w_in, w_out, b_in, b_out, w_gate), wants, strict=True)
    dx, *dweights = (t.new_empty(t.shape) if wanted else x.new_empty(0) for t, wanted in inputs)
    return (dx, torch.empty_like(gates_R), *dweights)


def _setup(ctx, inputs, output):
    *tensors, ctx.top_k, ctx.activation, _ = inputs
    _, pre, pre_gate = output
    ctx.mark_non_differentiable(pre, pre_gate)
    ctx.set_materialize_grads(False)  # or these two would be given zeros, as large as they are
    ctx.save_for_backward(*tensors, pre, pre_gate)


def _backward(ctx, dy, _dpre, _dpre_gate):
    if dy is None:
        return (None,) * 14
    saved = ctx.saved_tensors
    wants = [ctx.needs_input_grad[i] for i in (0, 4, 5, 6, 7, 8)]  # x, w_in, w_out, b_in, b_out, w_gate
    dx, dgates, *dweights = _expert_ffn_backward(dy, *saved, ctx.top_k, ctx.activation, wants)
    dx, *dweights = (d if wanted else None for wanted, d in zip(wants, (dx, *dweights), strict=True))
    return dx, None, None, dgates, *dweights, None, None, None, None, None


_expert_ffn.register_autograd(_backward, setup_context=_setup)


def expert_ffn(x: Tensor, rows: RowIndex, gates_R: Tensor, weights: FFNWeights, activation: str) -> Tensor:
    """Compute ``eager.expert_ffn``. The backward keeps ``x`` and (R, F) pre-activations.

    Raises:
        ValueError: tokens and weights are not of one dtype, tokens not as wide as the weights take them, other shapes
            that do not go together, or an unknown activation.
    """
    if isinstance(weights.w_in, QuantizedWeight):
        return quantized.expert_ffn(x, rows, gates_R, weights, activation)
    plain: tuple[Any, ...] = weights
    check_ffn(x, rows, gates_R, weights, activation)
    if _beyond(*plain, dtype=x.dtype):
        return grouped.expert_ffn(x, rows, gates_R, weights, activation)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, gates_R, *plain))
    order, starts, k = order_of(rows, x.shape[0])
    return _expert_ffn(x, rows.row_index_R, rows.offsets_E, gates_R, *plain, order, starts, k, activation, keep)[0]


@torch.library.custom_op("moesaic::triton_linear", mutates_args=())
def _linear(x_RD: Tensor, w: Tensor, offsets_E: Tensor, b: Tensor | None, transposed: bool) -> Tensor:
    check_width(x_RD, w.shape[2 if transposed else 1])
    y = x_RD.new_empty(x_RD.shape[0], w.shape[1 if transposed else 2])
    if y.numel():
        x_RD, w, offsets_E, b = dense(x_RD, w, offsets_E, b)
        products.linear(x_RD, w, offsets_E, y, transposed=transposed, bias=b, clear=True)
    return y


@_linear.register_fake
def _(x_RD, w, offsets_E, b, transposed):
    return x_RD.new_empty(x_RD.shape[0], w.shape[1 if transposed else 2])


@torch.library.custom_op("moesaic::triton_linear_dw", mutates_args=())
def _linear_dw(x_RD: Tensor, dy_RN: Tensor, offsets_E: Tensor, wants: list[bool]) -> tuple[Tensor, Tensor]:
    """Return the gradients of w and b, empty where ``wants`` is False."""
    E, D, N = offsets_E.shape[0], x_RD.shape[1], dy_RN.shape[1]
    wanted_w, wanted_b = wants
    if x_RD.shape[0] == 0:
        return x_RD.new_zeros(E if wanted_w else 0, D, N), x_RD.new_zeros(E if wanted_b else 0, N)
    x_RD, dy_RN, offsets_E = dense(x_RD, dy_RN, offsets_E)
    dw = products.weight_grad(x_RD, dy_RN, offsets_E) if wanted_w else x_RD.new_empty(0, D, N)
    db = products.column_sums(dy_RN, offsets_E).to(dy_RN.dtype) if wanted_b else dy_RN.new_empty(0, N)
    return dw, db


@_linear_dw.register_fake
def _(x_RD, dy_RN, offsets_E, wants):
    E, D, N = offsets_E.shape[0], x_RD.shape[1], dy_RN.shape[1]
    return x_RD.new_empty(E if wants[0] else 0, D, N), x_RD.new_empty(E if wants[1] else 0, N)


def _linear_setup(ctx, inputs, output):
    x_RD, w, offsets_E, b, ctx.transposed = inputs
    ctx.save_for_backward(x_RD, w, offsets_E)


def _linear_backward(ctx, dy_RN):
    x_RD, w, offsets_E = ctx.saved_tensors
    dx = _linear(dy_RN, w, offsets_E, None, not ctx.transposed) if ctx.needs_input_grad[0] else None
    dw = db = None
    wants = [ctx.needs_input_grad[i] for i in (1, 3)]
    if any(wants):
        dw, db = _linear_dw(x_RD, dy_RN, offsets_E, wants)
        dw = None if not wants[0] else dw.transpose(1, 2) if ctx.transposed else dw
    return dx, dw, None, db if wants[1] else None, None


_linear.register_autograd(_linear_backward, setup_context=_linear_setup)


def expert_linear(x_RD: Tensor, w: Weight, offsets_E: Tensor, b: Tensor | None = None) -> Tensor:
    """Compute ``eager.expert_linear``.

    Raises:
        ValueError: rows and weights are not of one dtype, rows not as wide as the weights take them, a bias not of the
            weights' shape, or offsets of another number of experts.
    """
    if isinstance(w, QuantizedWeight):
        return quantized.expert_linear(x_RD, w, offsets_E, b)
    check_shapes(b=(b, (w.shape[0], w.shape[2])), offsets_E=(offsets_E, (w.shape[0],)))
    if _beyond(w, b, dtype=x_RD.dtype):
        return grouped.expert_linear(x_RD, w, offsets_E, b)
    return _linear(x_RD, w, offsets_E, b, False)


def _beyond(*weights: Tensor | None, dtype: torch.dtype) -> bool:
    """Return whether the weights pass the kernels' limits; raise a ``ValueError`` if they have another dtype."""
    given = [w for w in weights if w is not None]
    for w in given:
        if w.dtype != dtype:
            raise ValueError(f"tokens are {dtype} and expert weights {w.dtype}: they must be of one dtype")
    return quantized.beyond(*given)
