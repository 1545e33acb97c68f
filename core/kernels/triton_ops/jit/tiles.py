"""Functions that the kernels share: the expert of a tile of rows, the order of tiles, matrices as they are stored,
activations."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def expert_tile(Offsets, tile, E, BLOCK_M: tl.constexpr, E_POW2: tl.constexpr):
    """Expert, first row and end of the expert's rows for tile ``tile`` of all experts' rows in blocks of ``BLOCK_M``.

    The expert is ``E`` or above if there are not so many tiles: how many there are only the device knows. The first
    row is then that after the last expert's, counted from there, of the tile as one of the tiles left over.
    """
    e = tl.arange(0, E_POW2)
    ends = tl.load(Offsets + e, mask=e < E, other=0)
    starts = tl.load(Offsets + e - 1, mask=(e > 0) & (e < E), other=0)
    tiles = (ends - starts + BLOCK_M - 1) // BLOCK_M
    expert = tl.sum((tl.cumsum(tiles, 0) <= tile).to(tl.int32), 0)
    before = tl.sum(tl.where(e < expert, tiles, 0), 0)
    begin = tl.sum(tl.where(e == expert, starts, 0), 0)
    end = tl.sum(tl.where(e == expert, ends, 0), 0)
    return expert, begin + (tile - before) * BLOCK_M, end


@triton.jit
def in_groups(pid, tiles_m, tiles_n, GROUP: tl.constexpr):
    """Row and column of tile ``pid``: ``GROUP`` row tiles share each column's weights while those are in the L2
    cache."""
    group = pid // (GROUP * tiles_n)
    first = group * GROUP
    rows = tl.minimum(tiles_m - first, GROUP)
    within = pid - group * GROUP * tiles_n
    return first + within % rows, within // rows


@triton.jit
def in_units(width, UNIT: tl.constexpr):
    """``width`` itself, a multiple of ``UNIT``. The compiler only sees divisibility by 16, and loads the numbers of
    other rows one by one: without ``cp.async``, so without a pipeline, and with an address each."""
    if UNIT == 1 or UNIT == 16:
        return width
    return width // UNIT * UNIT


@triton.jit
def load(at, mask, WHOLE: tl.constexpr):
    """Load the numbers at ``at``, zero outside the mask; ``WHOLE``: nothing is outside."""
    if WHOLE:
        return tl.load(at)
    return tl.load(at, mask=mask, other=0.0)


@triton.jit
def product(a, b, acc, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """``a @ b + acc`` with float32 sums. ``UPCAST``: the interpreter has no bfloat16 matmul."""
    if UPCAST:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def rounded(x, kind: tl.constexpr, UPCAST: tl.constexpr):
    """float32 ``x`` in ``kind``, to the nearest. ``UPCAST``: the interpreter would cut off, and turn values below the
    last bit of zero into a number."""
    if UPCAST:
        bits = x.to(tl.int32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16).to(tl.float32, bitcast=True)
    return x.to(kind)


@triton.jit
def matrix_tile(
    W,
    Scales,
    k,
    column,
    stride_k,
    stride_n,
    mask,
    kind: tl.constexpr,
    KIND: tl.constexpr,
    SIZE: tl.constexpr,
    WHOLE: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Numbers of one expert's matrix at rows ``k`` and columns ``column``, in ``kind``; zero outside the mask.

    W (K, N), for "int4" (ceil(K / 2), N) with two numbers per byte; Scales (K / SIZE, N). ``KIND`` None: floating
    point, without scales. ``SIZE`` 0: a channel has one scale, by which ``by_channel`` multiplies the sums, for half
    precision holds the integers exactly.
    """
    if KIND == "int4":
        at = W + ((k // 2)[:, None] * stride_k + column[None, :] * stride_n)
        if WHOLE:
            pair = tl.load(at)
        else:
            pair = tl.load(at, mask=mask, other=136)  # two zeros
        q = ((pair.to(tl.int32) >> ((k % 2) * 4)[:, None]) & 15) - 8
    else:
        q = load(W + (k[:, None] * stride_k + column[None, :] * stride_n), mask, WHOLE)
    if KIND is None:
        return q
    if SIZE == 0:
        return rounded(q.to(tl.float32), kind, UPCAST)
    scale = load(Scales + ((k // SIZE)[:, None] * stride_k + column[None, :] * stride_n), mask, WHOLE)
    return rounded(q.to(tl.float32) * scale.to(tl.float32), kind, UPCAST)


@triton.jit
def begin_of_matrix(expert, K, N, KIND: tl.constexpr, SIZE: tl.constexpr):
    """Offsets of an expert's matrix (K, N) in the stored numbers and in the scales."""
    stored = K
    if KIND == "int4":
        stored = tl.cdiv(K, 2)
    groups = 1
    if SIZE > 0:
        groups = K // SIZE
    return expert.to(tl.int64) * stored * N, expert.to(tl.int64) * groups * N


@triton.jit
def by_channel(acc, Scales, column, N, KIND: tl.constexpr, SIZE: tl.constexpr):
    """Sums times the scales of their channels, if a channel has one scale."""
    if KIND is not None and SIZE == 0:
        acc = acc * tl.load(Scales + column, mask=column < N, other=0.0).to(tl.float32)[None, :]
    return acc


@triton.jit
def activation(x, ACT: tl.constexpr):
    """Return the activation of float32 ``x``."""
    if ACT == "relu":
        return tl.maximum(x, 0.0)
    elif ACT == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACT == "gelu_tanh":  # (1 + tanh(z)) / 2 is sigmoid(2 z), z = sqrt(2 / pi) (x + 0.044715 x^3)
        return x * tl.sigmoid(x * (1.5957691216057308 + 0.0713548162726009 * x * x))
    elif ACT == "identity":
        return x
    else:
        return x * tl.sigmoid(x)


@triton.jit
def activation_grad(x, ACT: tl.constexpr):
    """Return the derivative of ``activation`` at float32 ``x``."""
    if ACT == "relu":
        return tl.where(x > 0.0, 1.0, 0.0)
    elif ACT == "gelu":
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * density
    elif ACT == "gelu_tanh":
        s = tl.sigmoid(x * (1.5957691216057308 + 0.0713548162726009 * x * x))
        return s + x * s * (1.0 - s) * (1.5957691216057308 + 0.2140644488178027 * x * x)
    elif ACT == "identity":
        return tl.zeros_like(x) + 1.0
    else:
        s = tl.sigmoid(x)
        return s * (1.0 + x * (1.0 - s))
