"""Sums of rows: of each token, of each expert, and over the columns of a row. No atomics: the same bits every time."""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import expert_tile, in_units, rounded


@triton.jit
def _row_of_pair(Y, Inverse, Gates, pair, real, d, mask, computed, D, WEIGHTED: tl.constexpr):
    """Columns ``d`` of the pairs' (gated) rows in float32, zero where a row was not computed."""
    row = tl.load(Inverse + pair, mask=real, other=0)
    live = row < computed
    y = tl.load(Y + row[:, None] * D + d[None, :], mask=mask & live[:, None], other=0.0).to(tl.float32)
    if WEIGHTED:
        y = y * tl.load(Gates + row, mask=real & live, other=0.0).to(tl.float32)[:, None]
    return y


@triton.jit(do_not_specialize=["T"])
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
    UNIT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Pairs are token-major: ``Out_t = sum over k of g_r Y_r`` with r = ``Inverse[t K + k]``; rows past the last offset
    are left out.

    Y (R, D); Inverse int64 (T K,); Gates (R,); Out (T, D).
    """
    D = in_units(D, UNIT)
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
def sum_of_any(
    Y,
    Rows,
    Starts,
    Gates,
    Out,
    D,
    WEIGHTED: tl.constexpr,
    UPCAST: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A token has any number of rows: ``Out_t = sum of g_r Y_r`` over ``Rows[Starts[t]:Starts[t + 1]]``."""
    D = in_units(D, UNIT)
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


@triton.jit(do_not_specialize=["R"])
def sum_grad(
    DOut,
    Y,
    Rows,
    Gates,
    Offsets,
    DY,
    DGates,
    R,
    D,
    E,
    WEIGHTED: tl.constexpr,
    UPCAST: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Gradients of the rows, ``DY_r = g_r DOut_t`` with t = ``Rows[r]``, and of the gates, ``<DOut_t, Y_r>``; zero past
    the last offset.

    DOut (T, D); Y, DY (R, D); Gates, DGates (R,).
    """
    D = in_units(D, UNIT)
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    there = row < R
    live = row < tl.load(Offsets + E - 1)
    token = tl.load(Rows + row, mask=there & live, other=0)
    # Rows past the last offset, their gates too, may hold NaN.
    gate = tl.full((BLOCK_R,), 1.0, tl.float32)
    if WEIGHTED:
        gate = tl.load(Gates + row, mask=there & live, other=0.0).to(tl.float32)
    acc = tl.zeros((BLOCK_R, BLOCK_D), tl.float32)
    for begin in range(0, D, BLOCK_D):
        d = begin + tl.arange(0, BLOCK_D)
        mask = there[:, None] & (d[None, :] < D)
        computed = mask & live[:, None]
        at = row[:, None] * D + d[None, :]
        dout = tl.load(DOut + token[:, None] * D + d[None, :], mask=computed, other=0.0).to(tl.float32)
        if WEIGHTED:
            acc += dout * tl.load(Y + at, mask=computed, other=0.0).to(tl.float32)
        tl.store(DY + at, rounded(gate[:, None] * dout, DY.dtype.element_ty, UPCAST), mask=mask)
    if WEIGHTED:
        tl.store(DGates + row, tl.sum(acc, 1).to(DGates.dtype.element_ty), mask=there)


@triton.jit
def column_sums(
    X,
    Gates,
    Rows,
    Offsets,
    Out,
    N,
    GATHER: tl.constexpr,
    WEIGHTED: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Sum of (gated) rows of each expert, the gradient of its bias: X (R, N) or (T, N), Out float32 (E, N)."""
    N = in_units(N, UNIT)
    tiles_n = tl.cdiv(N, BLOCK_N)
    expert = tl.program_id(0) // tiles_n
    n = (tl.program_id(0) % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    end = tl.load(Offsets + expert)
    start = tl.load(Offsets + expert - 1, mask=expert > 0, other=0)
    # Threads meet once, at the end, and not at each step.
    acc = tl.zeros((BLOCK_K, BLOCK_N), tl.float32)
    for begin in range(start, end, BLOCK_K):
        row = begin + tl.arange(0, BLOCK_K)
        live = row < end
        inside = tl.minimum(row, end - 1).to(tl.int64)
        token = inside
        if GATHER:
            token = tl.load(Rows + inside)
        mask = live[:, None] & (n[None, :] < N)
        x = tl.load(X + token[:, None] * N + n[None, :], mask=mask, other=0.0).to(tl.float32)
        if WEIGHTED:
            x = x * tl.load(Gates + inside, mask=live, other=0.0).to(tl.float32)[:, None]
        acc += x
    tl.store(Out + expert * N + n, tl.sum(acc, 0), mask=n < N)


@triton.jit
def gate_grad(
    Partial,
    DY,
    Bias,
    Rows,
    Offsets,
    Out,
    parts,
    N,
    E,
    GATHER: tl.constexpr,
    BIAS: tl.constexpr,
    UNIT: tl.constexpr,
    E_POW2: tl.constexpr,
    PARTS_POW2: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """``Out_r = sum of Partial_r + <dy, b_out>``: DY (T, N) or (R, N), Bias (E, N), Out (R,)."""
    N = in_units(N, UNIT)
    expert, start, end = expert_tile(Offsets, tl.program_id(0), E, BLOCK_M, E_POW2)
    if expert < E:
        row = start + tl.arange(0, BLOCK_M)
        live = row < end
        inside = tl.minimum(row, end - 1).to(tl.int64)
        part = tl.arange(0, PARTS_POW2)
        mask = live[:, None] & (part[None, :] < parts)
        total = tl.sum(tl.load(Partial + inside[:, None] * parts + part[None, :], mask=mask, other=0.0), 1)
        if BIAS:
            token = inside
            if GATHER:
                token = tl.load(Rows + inside)
            n = tl.arange(0, BLOCK_N)
            of_bias = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for begin in range(0, N, BLOCK_N):
                width = n < N - begin
                bias = tl.load(Bias + expert * N + begin + n, mask=width, other=0.0).to(tl.float32)
                dy_mask = live[:, None] & width[None, :]
                dy = tl.load(DY + token[:, None] * N + begin + n[None, :], mask=dy_mask, other=0.0).to(tl.float32)
                of_bias += dy * bias[None, :]
            total += tl.sum(of_bias, 1)
        tl.store(Out + inside, total.to(Out.dtype.element_ty), mask=live)
