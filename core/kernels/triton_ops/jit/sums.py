"""Sum of the rows of each token, float32, in the order of the rows: no atomics, the same bits every time."""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import rounded


@triton.jit
def _row_of_pair(Y, Inverse, Gates, pair, real, d, mask, computed, D, WEIGHTED: tl.constexpr):
    """Columns ``d`` of the pairs' (gated) rows in float32, zero where a row was not computed."""
    row = tl.load(Inverse + pair, mask=real, other=0)
    live = row < computed
    y = tl.load(Y + row[:, None] * D + d[None, :], mask=mask & live[:, None], other=0.0).to(tl.float32)
    if WEIGHTED:
        y = y * tl.load(Gates + row, mask=real & live, other=0.0).to(tl.float32)[:, None]
    return y


@triton.jit
def sum_of_k(
    Y,
    Inverse,
    Gates,
    Offsets,
    Out,
    T,
    D,
    E,
    K: tl.constexpr,
    WEIGHTED: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Pairs are token-major: ``Out_t = sum over k of g_r Y_r`` with r = ``Inverse[t K + k]``; rows past the last offset
    are left out.

    Y (R, D); Inverse int64 (T K,); Gates (R,); Out (T, D).
    """
    tiles_d = tl.cdiv(D, BLOCK_D)
    t = (tl.program_id(0) // tiles_d).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    d = (tl.program_id(0) % tiles_d) * BLOCK_D + tl.arange(0, BLOCK_D)
    computed = tl.load(Offsets + E - 1)
    mask = (t[:, None] < T) & (d[None, :] < D)
    acc = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    if K <= 16:
        for k in tl.static_range(K):
            acc += _row_of_pair(Y, Inverse, Gates, t * K + k, t < T, d, mask, computed, D, WEIGHTED)
    else:  # unrolled, a hundred rows take minutes to compile
        for k in range(K):
            acc += _row_of_pair(Y, Inverse, Gates, t * K + k, t < T, d, mask, computed, D, WEIGHTED)
    tl.store(Out + t[:, None] * D + d[None, :], rounded(acc, Out.dtype.element_ty, UPCAST), mask=mask)


@triton.jit
def sum_of_any(Y, Rows, Starts, Gates, Out, D, WEIGHTED: tl.constexpr, UPCAST: tl.constexpr, BLOCK_D: tl.constexpr):
    """A token has any number of rows: ``Out_t = sum of g_r Y_r`` over ``Rows[Starts[t]:Starts[t + 1]]``."""
    tiles_d = tl.cdiv(D, BLOCK_D)
    t = (tl.program_id(0) // tiles_d).to(tl.int64)
    d = (tl.program_id(0) % tiles_d) * BLOCK_D + tl.arange(0, BLOCK_D)
    acc = tl.zeros((BLOCK_D,), tl.float32)
    for i in range(tl.load(Starts + t), tl.load(Starts + t + 1)):
        row = tl.load(Rows + i)
        y = tl.load(Y + row * D + d, mask=d < D, other=0.0).to(tl.float32)
        if WEIGHTED:
            y = y * tl.load(Gates + row).to(tl.float32)
        acc += y
    tl.store(Out + t * D + d, rounded(acc, Out.dtype.element_ty, UPCAST), mask=d < D)
