"""Grouped products by quantised matrices, which become floating point in registers, tile by tile.

They go through the tiles as the kernels of ``products`` do. With one scale a channel whole numbers are multiplied,
which half precision holds exactly, and the sums are scaled in float32; with several each number is scaled before.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import activation, expert_tile, in_groups, in_units, load, product, rounded


@triton.jit
def matrix_tile(
    Values,
    Scales,
    k,
    column,
    N,
    mask,
    kind: tl.constexpr,
    KIND: tl.constexpr,
    SIZE: tl.constexpr,
    WHOLE: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Numbers of one expert's matrix at rows ``k`` and columns ``column``, in ``kind``; zero outside the mask.

    Values (K, N), or (ceil(K / 2), N) with two numbers a byte; Scales (K / SIZE, N). ``SIZE`` 0: they are not scaled.
    """
    if KIND == "int4":
        at = Values + ((k // 2)[:, None] * N + column[None, :])
        if WHOLE:
            pair = tl.load(at)
        else:
            pair = tl.load(at, mask=mask, other=136)  # two zeros
        q = ((pair.to(tl.int32) >> ((k % 2) * 4)[:, None]) & 15) - 8
    else:
        q = load(Values + (k[:, None] * N + column[None, :]), mask, WHOLE)
    if SIZE == 0:
        return rounded(q.to(tl.float32), kind, UPCAST)
    scale = load(Scales + ((k // SIZE)[:, None] * N + column[None, :]), mask, WHOLE)
    return rounded(q.to(tl.float32) * scale.to(tl.float32), kind, UPCAST)


@triton.jit(do_not_specialize=["R"])
def up_quantized(
    X,
    Rows,
    Offsets,
    Values,
    Scales,
    GateValues,
    GateScales,
    Bias,
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
    """``Hidden = act(X W + b)`` or ``act(X WGate) * (X W + b)``, without what a backward needs.

    X (T, D) with ``GATHER``, else (R, D); Values, Scales: W (E, D, F); Bias (E, F); Hidden (R, F).
    """
    D = in_units(D, UNIT_K)
    F = in_units(F, UNIT_N)
    kind: tl.constexpr = X.dtype.element_ty
    HALVES: tl.constexpr = 2 if KIND == "int4" else 1
    tiles_m = tl.cdiv(R, BLOCK_M) + tl.minimum(R, E)
    tiles_n = tl.cdiv(F, BLOCK_N)
    for pid in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        tile_m, tile_n = in_groups(pid, tiles_m, tiles_n, GROUP)
        expert, start, end = expert_tile(Offsets, tile_m, E, BLOCK_M, E_POW2)
        if expert < E:
            row = tl.arange(0, BLOCK_M)
            token = tl.minimum(start + row, end - 1).to(tl.int64)
            if GATHER:
                token = tl.load(Rows + token)
            column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
            k = tl.arange(0, BLOCK_K)
            x_row = X + token * D
            of_values = expert.to(tl.int64) * tl.cdiv(D, HALVES) * F
            groups = 1
            if SIZE > 0:
                groups = D // SIZE
            of_scales = expert.to(tl.int64) * groups * F
            acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            acc_gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for begin in range(0, D, BLOCK_K):
                x = load(x_row[:, None] + (begin + k)[None, :], (begin + k)[None, :] < D, EVEN_K)
                mask = ((begin + k)[:, None] < D) & (column[None, :] < F)
                w = matrix_tile(
                    Values + of_values,
                    Scales + of_scales,
                    begin + k,
                    column,
                    F,
                    mask,
                    kind,
                    KIND,
                    SIZE,
                    EVEN_K and EVEN_N,
                    UPCAST,
                )
                acc = product(x, w, acc, PRECISION, UPCAST)
                if GATED:
                    w_gate = matrix_tile(
                        GateValues + of_values,
                        GateScales + of_scales,
                        begin + k,
                        column,
                        F,
                        mask,
                        kind,
                        KIND,
                        SIZE,
                        EVEN_K and EVEN_N,
                        UPCAST,
                    )
                    acc_gate = product(x, w_gate, acc_gate, PRECISION, UPCAST)
            if SIZE == 0:
                scale = tl.load(Scales + of_scales + column, mask=column < F, other=0.0)
                acc = acc * scale.to(tl.float32)[None, :]
                if GATED:
                    gate_scale = tl.load(GateScales + of_scales + column, mask=column < F, other=0.0)
                    acc_gate = acc_gate * gate_scale.to(tl.float32)[None, :]
            if BIAS:
                bias = tl.load(Bias + expert * F + column, mask=column < F, other=0.0)
                acc += bias.to(tl.float32)[None, :]
            if GATED:
                h = activation(acc_gate, ACT) * acc
            else:
                h = activation(acc, ACT)
            out_at = row[:, None] * F + column[None, :]
            out_mask = (row[:, None] < end - start) & (column[None, :] < F)
            tl.store(Hidden + start.to(tl.int64) * F + out_at, rounded(h, kind, UPCAST), mask=out_mask)


@triton.jit(do_not_specialize=["R"])
def linear_quantized(
    X,
    Values,
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
    """``Out = g (X W + b)``, to the rows' own places or to their tokens'.

    X (R, D); Values, Scales: W (E, D, N); Bias (E, N); Gates (R,); Out (R, N), or (T, N) with ``SCATTER``, where a
    token has one row at most. ``CLEAR``, without ``SCATTER``: rows past the last offset are zero.
    """
    D = in_units(D, UNIT_K)
    N = in_units(N, UNIT_N)
    kind: tl.constexpr = X.dtype.element_ty
    HALVES: tl.constexpr = 2 if KIND == "int4" else 1
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
            of_values = expert.to(tl.int64) * tl.cdiv(D, HALVES) * N
            groups = 1
            if SIZE > 0:
                groups = D // SIZE
            of_scales = expert.to(tl.int64) * groups * N
            acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for begin in range(0, D, BLOCK_K):
                x = load((X + x_row)[:, None] + (begin + k)[None, :], (begin + k)[None, :] < D, EVEN_K)
                mask = ((begin + k)[:, None] < D) & (column[None, :] < N)
                w = matrix_tile(
                    Values + of_values,
                    Scales + of_scales,
                    begin + k,
                    column,
                    N,
                    mask,
                    kind,
                    KIND,
                    SIZE,
                    EVEN_K and EVEN_N,
                    UPCAST,
                )
                acc = product(x, w, acc, PRECISION, UPCAST)
            if SIZE == 0:
                scale = tl.load(Scales + of_scales + column, mask=column < N, other=0.0)
                acc = acc * scale.to(tl.float32)[None, :]
            if BIAS:
                bias = tl.load(Bias + expert * N + column, mask=column < N, other=0.0)
                acc += bias.to(tl.float32)[None, :]
            if WEIGHTED:
                acc = acc * tl.load(Gates + inside).to(tl.float32)[:, None]
            mask = (row[:, None] < end - start) & (column[None, :] < N)
            if SCATTER:
                out_row = Out + tl.load(Rows + inside) * N
                tl.store(out_row[:, None] + column[None, :], rounded(acc, kind, UPCAST), mask=mask)
            else:
                tile_at = Out + start.to(tl.int64) * N
                tl.store(tile_at + (row[:, None] * N + column[None, :]), rounded(acc, kind, UPCAST), mask=mask)
        elif CLEAR:
            # As in ``products.linear``: the tiles that are left over are enough for the rows that are.
            rest = (tl.load(Offsets + E - 1) + start).to(tl.int64) + tl.arange(0, BLOCK_M)
            column = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
            zeros = tl.zeros((BLOCK_M, BLOCK_N), kind)
            mask = (rest[:, None] < R) & (column[None, :] < N)
            tl.store(Out + (rest[:, None] * N + column[None, :]), zeros, mask=mask)
