"""Grouped matmuls: the rows of each expert times its matrix, with gather, bias, activation and gate inside.

Matrices of forward matmuls may be quantized: they become floating point in registers, tile by tile.

Rows are sorted by expert, ``Offsets`` are inclusive counts. A tile holds rows of one expert; the last tile of an expert
is padded by masks, never in memory. The number of tiles is only known on the device: a launch covers the most there can
be, ``ceil(R / BLOCK_M) + min(E, R)``, and the tiles that are not there end at once. One launch of as many programs as
there are multiprocessors walks the tiles in a loop (persistent); one program per tile is the same code.

Sums run over ``BLOCK_K`` numbers at a time from first to last, whatever the tile: what tuning chooses does not change a
bit of the result.

Numbers that follow from how many tokens there are (``do_not_specialize``) are not compiled in, here as in the other
files: batches of other sizes would be recompiled whenever one is a multiple of 16 and the other is not.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import (
    activation,
    activation_grad,
    begin_of_matrix,
    by_channel,
    expert_tile,
    in_groups,
    in_units,
    load,
    matrix_tile,
    product,
    rounded,
)


@triton.jit(do_not_specialize=["R"])
def up(
    X,
    Rows,
    Offsets,
    W,
    Scales,
    WGate,
    GateScales,
    Bias,
    Pre,
    PreGate,
    Hidden,
    D,
    F,
    E,
    R,
    KIND: tl.constexpr,
    SIZE: tl.constexpr,
    ACT: tl.constexpr,
    GATHER: tl.constexpr,
    GATED: tl.constexpr,
    BIAS: tl.constexpr,
    KEEP: tl.constexpr,
    UNIT_K: tl.constexpr,
    UNIT_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    EVEN_N: tl.constexpr,
    E_POW2: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """``Hidden = act(X W + b)`` or ``act(X WGate) * (X W + b)``; ``Pre`` and ``PreGate`` are saved for the backward.

    X (T, D) with ``GATHER``, else (R, D); W, WGate (E, D, F), with their scales as ``matrix_tile`` has them; Bias
    (E, F); Pre, PreGate, Hidden (R, F).
    """
    D = in_units(D, UNIT_K)
    F = in_units(F, UNIT_N)
    kind: tl.constexpr = X.dtype.element_ty
    WHOLE: tl.constexpr = EVEN_K and EVEN_N
    tiles_m = tl.cdiv(R, BLOCK_M) + tl.minimum(R, E)
    tiles_n = tl.cdiv(F, BLOCK_N)
    for pid in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        tile_m, tile_n = in_groups(pid, tiles_m, tiles_n, GROUP)
        expert, start, end = expert_tile(Offsets, tile_m, E, BLOCK_M, E_POW2)
        if expert < E:
            row = tl.arange(0, BLOCK_M)
            # What tiles hold past an expert's rows is computed and not stored.
            token = tl.minimum(start + row, end - 1).to(tl.int64)
            if GATHER:
                token = tl.load(Rows + token)
            column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
            k = tl.arange(0, BLOCK_K)
            x_row = X + token * D
            of_w, of_scales = begin_of_matrix(expert, D, F, KIND, SIZE)
            w_1, scales_1 = W + of_w, Scales + of_scales
            w_2, scales_2 = WGate + of_w, GateScales + of_scales
            acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            acc_gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for begin in range(0, D, BLOCK_K):
                x = load(x_row[:, None] + (begin + k)[None, :], (begin + k)[None, :] < D, EVEN_K)
                mask = ((begin + k)[:, None] < D) & (column[None, :] < F)
                w = matrix_tile(w_1, scales_1, begin + k, column, F, 1, mask, kind, KIND, SIZE, WHOLE, UPCAST)
                acc = product(x, w, acc, PRECISION, UPCAST)
                if GATED:
                    w = matrix_tile(w_2, scales_2, begin + k, column, F, 1, mask, kind, KIND, SIZE, WHOLE, UPCAST)
                    acc_gate = product(x, w, acc_gate, PRECISION, UPCAST)
            acc = by_channel(acc, scales_1, column, F, KIND, SIZE)
            if GATED:
                acc_gate = by_channel(acc_gate, scales_2, column, F, KIND, SIZE)
            if BIAS:
                bias = tl.load(Bias + expert * F + column, mask=column < F, other=0.0)
                acc += bias.to(tl.float32)[None, :]
            tile_at = start.to(tl.int64) * F
            out_at = row[:, None] * F + column[None, :]
            out_mask = (row[:, None] < end - start) & (column[None, :] < F)
            # The backward sees rounded pre-activations: so does the forward.
            pre = rounded(acc, kind, UPCAST)
            if GATED:
                pre_gate = rounded(acc_gate, kind, UPCAST)
                h = activation(pre_gate.to(tl.float32), ACT) * pre.to(tl.float32)
            else:
                h = activation(pre.to(tl.float32), ACT)
            if KEEP:
                tl.store(Pre + tile_at + out_at, pre, mask=out_mask)
                if GATED:
                    tl.store(PreGate + tile_at + out_at, pre_gate, mask=out_mask)
            tl.store(Hidden + tile_at + out_at, rounded(h, kind, UPCAST), mask=out_mask)


@triton.jit(do_not_specialize=["R"])
def linear(
    X,
    X2,
    W,
    W2,
    Scales,
    Bias,
    Gates,
    Rows,
    Offsets,
    Out,
    D,
    N,
    E,
    R,
    KIND: tl.constexpr,
    SIZE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    SECOND: tl.constexpr,
    BIAS: tl.constexpr,
    WEIGHTED: tl.constexpr,
    SCATTER: tl.constexpr,
    CLEAR: tl.constexpr,
    UNIT_K: tl.constexpr,
    UNIT_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    EVEN_N: tl.constexpr,
    E_POW2: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """``Out = g (X W + b)``, with ``SECOND`` ``g (X W + X2 W2 + b)``, to the rows' own places or to their tokens'.

    X, X2 (R, D); W, W2 (E, D, N), ``TRANSPOSED`` (E, N, D), or W quantized as ``matrix_tile`` has it, without W2 and
    not transposed; Bias (E, N); Gates (R,); Out (R, N), or (T, N) with ``SCATTER``, if a token has one row at most.
    ``CLEAR``, without ``SCATTER``: rows past the last offset are zero.
    """
    D = in_units(D, UNIT_K)
    N = in_units(N, UNIT_N)
    kind: tl.constexpr = X.dtype.element_ty
    WHOLE: tl.constexpr = EVEN_K and EVEN_N
    stride_k = 1 if TRANSPOSED else N
    stride_n = D if TRANSPOSED else 1
    tiles_m = tl.cdiv(R, BLOCK_M) + tl.minimum(R, E)
    tiles_n = tl.cdiv(N, BLOCK_N)
    for pid in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        tile_m, tile_n = in_groups(pid, tiles_m, tiles_n, GROUP)
        expert, start, end = expert_tile(Offsets, tile_m, E, BLOCK_M, E_POW2)
        if expert < E:
            row = tl.arange(0, BLOCK_M)
            inside = tl.minimum(start + row, end - 1)
            column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
            k = tl.arange(0, BLOCK_K)
            x_row = inside.to(tl.int64) * D
            of_w, of_scales = begin_of_matrix(expert, D, N, KIND, SIZE)
            w_1, w_2, scales = W + of_w, W2 + of_w, Scales + of_scales
            acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for begin in range(0, D, BLOCK_K):
                x = load((X + x_row)[:, None] + (begin + k)[None, :], (begin + k)[None, :] < D, EVEN_K)
                mask = ((begin + k)[:, None] < D) & (column[None, :] < N)
                w = matrix_tile(
                    w_1, scales, begin + k, column, stride_k, stride_n, mask, kind, KIND, SIZE, WHOLE, UPCAST
                )
                acc = product(x, w, acc, PRECISION, UPCAST)
            if SECOND:
                for begin in range(0, D, BLOCK_K):
                    x = load((X2 + x_row)[:, None] + (begin + k)[None, :], (begin + k)[None, :] < D, EVEN_K)
                    mask = ((begin + k)[:, None] < D) & (column[None, :] < N)
                    w = matrix_tile(
                        w_2, scales, begin + k, column, stride_k, stride_n, mask, kind, KIND, SIZE, WHOLE, UPCAST
                    )
                    acc = product(x, w, acc, PRECISION, UPCAST)
            acc = by_channel(acc, scales, column, N, KIND, SIZE)
            if BIAS:
                bias = tl.load(Bias + expert * N + column, mask=column < N, other=0.0)
                acc += bias.to(tl.float32)[None, :]
            if WEIGHTED:
                acc = acc * tl.load(Gates + inside).to(tl.float32)[:, None]
            mask = (row[:, None] < end - start) & (column[None, :] < N)
            if SCATTER:
                out_row = Out + tl.load(Rows + inside) * N
                tl.store(out_row[:, None] + column[None, :], rounded(acc, Out.dtype.element_ty, UPCAST), mask=mask)
            else:
                tile_at = Out + start.to(tl.int64) * N
                tl.store(
                    tile_at + (row[:, None] * N + column[None, :]),
                    rounded(acc, Out.dtype.element_ty, UPCAST),
                    mask=mask,
                )
        elif CLEAR:
            # The tiles that are left over are enough for the rows that are: ``start`` counts from the last offset.
            rest = (tl.load(Offsets + E - 1) + start).to(tl.int64) + tl.arange(0, BLOCK_M)
            column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
            zeros = tl.zeros((BLOCK_M, BLOCK_N), Out.dtype.element_ty)
            mask = (rest[:, None] < R) & (column[None, :] < N)
            tl.store(Out + (rest[:, None] * N + column[None, :]), zeros, mask=mask)


@triton.jit(do_not_specialize=["R"])
def hidden_grad(
    DY,
    Rows,
    Offsets,
    W,
    Gates,
    Pre,
    PreGate,
    DPre,
    DPreGate,
    Weighted,
    Partial,
    N,
    F,
    E,
    R,
    ACT: tl.constexpr,
    GATHER: tl.constexpr,
    GATED: tl.constexpr,
    UNIT_K: tl.constexpr,
    UNIT_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    EVEN_N: tl.constexpr,
    E_POW2: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):
    """Gradients at the pre-activations, from ``dh = dy W^T`` with W (E, F, N).

    ``DPre``, ``DPreGate`` (R, F): times the gate. ``Weighted`` (R, F): the gate times h, for the gradient of W.
    ``Partial`` (R, tiles of F): ``<dh, h>`` of each tile, whose sum is the gradient of the gate (arXiv 2512.14080).
    """
    HALF: tl.constexpr = BLOCK_N // 2
    N = in_units(N, UNIT_K)
    F = in_units(F, UNIT_N)
    tiles_m = tl.cdiv(R, BLOCK_M) + tl.minimum(R, E)
    tiles_n = tl.cdiv(F, BLOCK_N)
    for pid in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        tile_m, tile_n = in_groups(pid, tiles_m, tiles_n, GROUP)
        expert, start, end = expert_tile(Offsets, tile_m, E, BLOCK_M, E_POW2)
        if expert < E:
            row = tl.arange(0, BLOCK_M)
            live = row < end - start
            inside = tl.minimum(start + row, end - 1)
            token = inside.to(tl.int64)
            if GATHER:
                token = tl.load(Rows + inside)
            column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
            k = tl.arange(0, BLOCK_K)
            dy_row = DY + token * N
            w_expert = W + expert.to(tl.int64) * F * N
            dh = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for begin in range(0, N, BLOCK_K):
                dy = load(dy_row[:, None] + (begin + k)[None, :], (begin + k)[None, :] < N, EVEN_K)
                w_mask = ((begin + k)[:, None] < N) & (column[None, :] < F)
                w = load(w_expert + (column[None, :] * N + (begin + k)[:, None]), w_mask, EVEN_K and EVEN_N)
                dh = product(dy, w, dh, PRECISION, UPCAST)
            gate = tl.load(Gates + inside).to(tl.float32)[:, None]
            first = start.to(tl.int64) * F + tile_n * BLOCK_N
            at = row[:, None] * F + tl.arange(0, HALF)[None, :]
            # Half of the columns after the other: all of them at once take twice the registers.
            left, right = tl.split(tl.permute(tl.reshape(dh, (BLOCK_M, 2, HALF)), (0, 2, 1)))
            mask = live[:, None] & (tile_n * BLOCK_N + tl.arange(0, HALF) < F)[None, :]
            partial = _hidden_grad_end(
                left, first, at, mask, gate, Pre, PreGate, DPre, DPreGate, Weighted, ACT, GATED, UPCAST
            )
            mask = live[:, None] & (tile_n * BLOCK_N + HALF + tl.arange(0, HALF) < F)[None, :]
            partial += _hidden_grad_end(
                right, first + HALF, at, mask, gate, Pre, PreGate, DPre, DPreGate, Weighted, ACT, GATED, UPCAST
            )
            tl.store(Partial + inside.to(tl.int64) * tiles_n + tile_n, partial, mask=live)


@triton.jit
def _hidden_grad_end(
    dh,
    first,
    at,
    mask,
    gate,
    Pre,
    PreGate,
    DPre,
    DPreGate,
    Weighted,
    ACT: tl.constexpr,
    GATED: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Stores at ``first + at`` what ``hidden_grad`` gives for these numbers of ``dh``; ``<dh, h>`` of each row of
    them."""
    kind = DPre.dtype.element_ty
    a = tl.load(Pre + first + at, mask=mask, other=0.0).to(tl.float32)
    if GATED:
        u = tl.load(PreGate + first + at, mask=mask, other=0.0).to(tl.float32)
        s = activation(u, ACT)
        du = gate * dh * a * activation_grad(u, ACT)
        tl.store(DPreGate + first + at, rounded(du, kind, UPCAST), mask=mask)
        h = s * a
        tl.store(DPre + first + at, rounded(gate * dh * s, kind, UPCAST), mask=mask)
    else:
        h = activation(a, ACT)
        tl.store(DPre + first + at, rounded(gate * dh * activation_grad(a, ACT), kind, UPCAST), mask=mask)
    tl.store(Weighted + first + at, rounded(gate * h, kind, UPCAST), mask=mask)
    # Zero past F: dh is there, for weights past F were read as zero.
    return tl.sum(dh * h, 1)


@triton.jit
def weight_grad(
    Left,
    Right,
    Rows,
    Offsets,
    DW,
    M,
    N,
    GATHER_LEFT: tl.constexpr,
    GATHER_RIGHT: tl.constexpr,
    UNIT_M: tl.constexpr,
    UNIT_N: tl.constexpr,
    EVEN_M: tl.constexpr,
    EVEN_N: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """``DW_e = Left^T Right`` over the rows of each expert; zero where it has none.

    Left (R, M), or (T, M) with ``GATHER_LEFT``; Right (R, N), or (T, N) with ``GATHER_RIGHT``; DW (E, M, N).
    """
    M = in_units(M, UNIT_M)
    N = in_units(N, UNIT_N)
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    expert = pid // (tiles_m * tiles_n)
    within = pid % (tiles_m * tiles_n)
    m = (within // tiles_n) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (within % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    end = tl.load(Offsets + expert)
    start = tl.load(Offsets + expert - 1, mask=expert > 0, other=0)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if GATHER_LEFT or GATHER_RIGHT:
        # One step ahead, in registers: loaded where it is used, the index takes stages of the pipeline, and every
        # product waits for its own rows.
        first = start + tl.arange(0, BLOCK_K)
        ahead = tl.load(Rows + first, mask=first < end, other=0)
    for begin in range(start, end, BLOCK_K):
        row = begin + tl.arange(0, BLOCK_K)
        live = row < end
        left_row = row.to(tl.int64)
        right_row = row.to(tl.int64)
        if GATHER_LEFT:
            left_row = ahead
        if GATHER_RIGHT:
            right_row = ahead
        if GATHER_LEFT or GATHER_RIGHT:
            ahead = tl.load(Rows + row + BLOCK_K, mask=row + BLOCK_K < end, other=0)
        # Rows past the end are another expert's: both factors are cleared, for 0 * NaN is NaN.
        left_at = (Left + left_row * M)[None, :] + m[:, None]
        right_at = (Right + right_row * N)[:, None] + n[None, :]
        if EVEN_M:
            left = tl.load(left_at, mask=live[None, :], other=0.0)
        else:
            left = tl.load(left_at, mask=live[None, :] & (m[:, None] < M), other=0.0)
        if EVEN_N:
            right = tl.load(right_at, mask=live[:, None], other=0.0)
        else:
            right = tl.load(right_at, mask=live[:, None] & (n[None, :] < N), other=0.0)
        acc = product(left, right, acc, PRECISION, UPCAST)
    at = DW + expert.to(tl.int64) * M * N
    mask = (m[:, None] < M) & (n[None, :] < N)
    tl.store(at + (m[:, None] * N + n[None, :]), rounded(acc, DW.dtype.element_ty, UPCAST), mask=mask)
