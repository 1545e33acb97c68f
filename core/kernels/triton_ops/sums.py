"""Sum of the rows of each token."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..eager import RowIndex, accumulate_dtype, check_shapes
from .environment import interpreted, upcast
from .launch import Launch, dense, power_of_two
from .sort import MAX_BINS, find_places


@torch.library.custom_op("moesaic::triton_rows_by_token", mutates_args=())
def rows_by_token(row_index_R: Tensor, offsets_E: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
    """Return the rows of each token, of which a token may have any number: int64 (R,) rows, int64 (T + 1,) starts.

    Rows past the last offset come last and belong to none. No host synchronization. For tokens that have ``top_k`` rows
    each nothing has to be sorted: see ``sum_rows``.
    """
    R, device = row_index_R.shape[0], row_index_R.device
    row_R = torch.arange(R, device=device)
    token_R = torch.where(row_R < offsets_E[-1], row_index_R, num_tokens)
    if num_tokens < MAX_BINS:
        _, rows, ends = find_places(token_R, num_tokens + 1)
        return rows, torch.nn.functional.pad(ends[:-1], (1, 0)).to(torch.int64)
    rows = token_R.argsort(stable=True)
    counts = torch.zeros(num_tokens + 1, dtype=torch.int64, device=device)
    counts = counts.scatter_add_(0, token_R, torch.ones_like(token_R))
    return rows, torch.cat((counts.new_zeros(1), counts.cumsum(0)[:-1]))


@rows_by_token.register_fake
def _(row_index_R, offsets_E, num_tokens):
    return torch.empty_like(row_index_R), row_index_R.new_empty(num_tokens + 1)


def order_of(rows: RowIndex, num_tokens: int) -> tuple[Tensor | None, Tensor | None, int]:
    """Return ``rows``, ``starts`` and ``top_k`` of ``sum_rows``; no rows if each token has one."""
    index_R, offsets_E, inverse_N, top_k = rows
    if index_R is None or (inverse_N is not None and top_k == 1):
        return None, None, top_k or 0
    if inverse_N is None or top_k is None:
        return *rows_by_token(index_R, offsets_E, num_tokens), 0
    return inverse_N, None, top_k


def sum_rows(
    y_RD: Tensor,
    rows: Tensor,
    starts: Tensor | None,
    offsets_E: Tensor,
    gates_R: Tensor | None,
    num_tokens: int,
    top_k: int,
    dtype: torch.dtype,
) -> Tensor:
    """Return the sum of the (gated) rows of each token, (T, D).

    ``rows`` and ``starts`` come from ``rows_by_token``. If pairs are token-major, ``rows`` is the row of each pair
    and ``starts`` is None.
    """
    D = y_RD.shape[1]
    out = y_RD.new_empty(num_tokens, D, dtype=dtype)
    if out.numel() == 0:
        return out
    if y_RD.shape[0] == 0:
        return out.zero_()
    wide = min(power_of_two(D), 32 if interpreted() else 512)
    gates = y_RD if gates_R is None else gates_R
    constants = {"WEIGHTED": gates_R is not None, "UPCAST": upcast(dtype), "UNIT": math.gcd(D, 16), "BLOCK_D": wide}
    if starts is not None:
        grid = num_tokens * -(-D // wide)
        Launch("sums.sum_of_any", (y_RD, rows, starts, gates, out, D), constants, lambda _: grid).run()
        return out
    high = 4
    constants |= {"K": top_k, "BLOCK_T": high}
    grid = -(-num_tokens // high) * -(-D // wide)
    args = (y_RD, rows, gates, offsets_E, out, num_tokens, D, offsets_E.shape[0])
    Launch("sums.sum_of_k", args, constants, lambda _: grid).run()
    return out


@torch.library.custom_op("moesaic::triton_combine", mutates_args=())
def _combine(
    y_RD: Tensor,
    row_index_R: Tensor,
    offsets_E: Tensor,
    gates_R: Tensor | None,
    rows: Tensor,
    starts: Tensor | None,
    num_tokens: int,
    top_k: int,
) -> Tensor:
    y_RD, offsets_E, gates_R, rows, starts = dense(y_RD, offsets_E, gates_R, rows, starts)
    return sum_rows(y_RD, rows, starts, offsets_E, gates_R, num_tokens, top_k, accumulate_dtype(y_RD.dtype))


@_combine.register_fake
def _(y_RD, row_index_R, offsets_E, gates_R, rows, starts, num_tokens, top_k):
    return y_RD.new_empty(num_tokens, y_RD.shape[1], dtype=accumulate_dtype(y_RD.dtype))


def sum_rows_grad(
    dout: Tensor,
    y_RD: Tensor | None,
    row_index_R: Tensor,
    offsets_E: Tensor,
    gates_R: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of the rows in ``dtype``, (R, D), and of the gates, (R,).

    ``y_RD`` and ``gates_R`` are both None if rows are not gated, and the gates' gradient is empty then.
    """
    R, D = row_index_R.shape[0], dout.shape[1]
    dy_RD = dout.new_empty(R, D, dtype=dtype)
    dgates_R = dout.new_empty(0) if gates_R is None else gates_R.new_empty(R)
    if R == 0:
        return dy_RD, dgates_R
    dout, row_index_R, offsets_E = dense(dout, row_index_R, offsets_E)
    y, gates = dense(dout if y_RD is None else y_RD, dout if gates_R is None else gates_R)
    high, wide = 4, min(power_of_two(D), 32 if interpreted() else 512)
    constants = {
        "WEIGHTED": gates_R is not None,
        "UPCAST": upcast(dtype),
        "UNIT": math.gcd(D, 16),
        "BLOCK_R": high,
        "BLOCK_D": wide,
    }
    args = (dout, y, row_index_R, gates, offsets_E, dy_RD, dgates_R, R, D, offsets_E.shape[0])
    Launch("sums.sum_grad", args, constants, lambda _: -(-R // high)).run()
    return dy_RD, dgates_R


_combine_backward = torch.library.custom_op("moesaic::triton_combine_backward", sum_rows_grad, mutates_args=())


@_combine_backward.register_fake
def _(dout, y_RD, row_index_R, offsets_E, gates_R, dtype):
    R, D = row_index_R.shape[0], dout.shape[1]
    return dout.new_empty(R, D, dtype=dtype), dout.new_empty(0) if gates_R is None else gates_R.new_empty(R)


def _setup(ctx, inputs, output):
    y_RD, row_index_R, offsets_E, gates_R, *_ = inputs
    ctx.dtype = y_RD.dtype
    # Without gates the gradient does not depend on the rows.
    ctx.save_for_backward(None if gates_R is None else y_RD, row_index_R, offsets_E, gates_R)


def _backward(ctx, dout):
    y_RD, row_index_R, offsets_E, gates_R = ctx.saved_tensors
    dy_RD, dgates_R = _combine_backward(dout, y_RD, row_index_R, offsets_E, gates_R, ctx.dtype)
    return dy_RD, None, None, None if gates_R is None else dgates_R, None, None, None, None


_combine.register_autograd(_backward, setup_context=_setup)


def combine(y_RD: Tensor, rows: RowIndex, gates_R: Tensor | None, num_tokens: int) -> Tensor:
    """Sum as ``eager.combine`` does, without a sort if ``rows`` has the places of token-major pairs.

    Raises:
        ValueError: an index or gates without one number per row.
    """
    index_R, offsets_E, inverse_N, top_k = rows
    R = y_RD.shape[:1]
    check_shapes(row_index_R=(index_R, R), gates_R=(gates_R, R))
    assert index_R is not None
    if inverse_N is None or top_k is None:
        order, starts = rows_by_token(index_R, offsets_E, num_tokens)
        return _combine(y_RD, index_R, offsets_E, gates_R, order, starts, num_tokens, 0)
    return _combine(y_RD, index_R, offsets_E, gates_R, inverse_N, None, num_tokens, top_k)
