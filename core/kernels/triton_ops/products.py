"""Launches of the grouped matmuls: which kernel, with which flags, on which grid."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ..quantized import Weight
from .environment import interpreted, upcast
from .launch import Launch, power_of_two, programs
from .tuning import Tile, block_k, tiles

ROWS_AT_A_TIME = 64


def _flags(x: Tensor) -> dict[str, object]:
    """Return the flags of matmuls of this dtype: float32 is exact unless torch's own matmuls may use tf32."""
    tf32 = x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return {"PRECISION": "tf32" if tf32 else "ieee", "UPCAST": upcast(x.dtype)}


def _tiles_m(rows: int, experts: int, height: int) -> int:
    """Return the most row tiles that there can be: one unfinished tile for each expert that has rows."""
    return -(-rows // height) + min(experts, rows)


def up(
    x: Tensor,
    row_index_R: Tensor | None,
    offsets_E: Tensor,
    w: Weight,
    w_gate: Weight | None,
    bias: Tensor | None,
    activation: str,
    rows: int,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``hidden`` (R, F), and the pre-activations of ``w`` and ``w_gate``, empty without ``keep``."""
    kind, values, scales = _stored_as(w)
    _, gate, gate_scales = _stored_as(w if w_gate is None else w_gate)
    E, D, F = w.shape
    hidden = x.new_empty(rows, F)
    pre = x.new_empty(rows if keep else 0, F)
    pre_gate = x.new_empty(rows if keep and w_gate is not None else 0, F)
    constants = {
        **kind,
        "ACT": activation,
        "GATHER": row_index_R is not None,
        "GATED": w_gate is not None,
        "BIAS": bias is not None,
        "KEEP": keep,
    }
    matrices = (values, scales, gate, gate_scales)
    pointers = (x, _or(row_index_R, offsets_E), offsets_E, *matrices, _or(bias, x), pre, pre_gate, hidden)
    tuned_as = _tuned_as(_two_sums(activation) if w_gate is not None else "up", w)
    _by_rows("products.up", tuned_as, pointers, constants, (E, D, F), rows, x)
    return hidden, pre, pre_gate


def _two_sums(activation: str) -> str:
    return "up_geglu" if activation == "gelu" else "up_swiglu"


def _tuned_as(kernel: str, w: Weight) -> str:
    """Return the name under which ``tuning`` has the tiles of a kernel."""
    return kernel if isinstance(w, Tensor) else f"{kernel}_quantized"


def linear(
    x: Tensor,
    w: Weight,
    offsets_E: Tensor,
    out: Tensor,
    *,
    transposed: bool = False,
    second: tuple[Tensor, Tensor] | None = None,
    bias: Tensor | None = None,
    gates_R: Tensor | None = None,
    row_index_R: Tensor | None = None,
    clear: bool = False,
) -> None:
    """Compute ``out = g (x w + x2 w2 + b)``; rows go to ``row_index_R`` of ``out`` if it is given.

    Args:
        x: (R, D); w: (E, D, N), or ``transposed`` (E, N, D). Quantized ones are neither transposed nor two.
        second: x2 and w2, of the same shapes.
        clear: set rows past the last offset to zero; not with ``row_index_R``.
    """
    E, D, N = w.shape if not transposed else (w.shape[0], w.shape[2], w.shape[1])
    kind, values, scales = _stored_as(w)
    x2, w2 = second or (x, values)
    constants = {
        **kind,
        "TRANSPOSED": transposed,
        "SECOND": second is not None,
        "BIAS": bias is not None,
        "WEIGHTED": gates_R is not None,
        "SCATTER": row_index_R is not None,
        "CLEAR": clear,
    }
    rows = (_or(gates_R, x), _or(row_index_R, offsets_E), offsets_E)
    pointers = (x, x2, values, w2, scales, _or(bias, x), *rows, out)
    _by_rows("products.linear", _tuned_as("linear", w), pointers, constants, (E, D, N), x.shape[0], x)


def _stored_as(w: Weight) -> tuple[dict[str, object], Tensor, Tensor]:
    """Return the constants that say how a kernel reads matrices, their numbers, and their scales if they have any."""
    if isinstance(w, Tensor):
        return {"KIND": None, "SIZE": 0}, w, w
    return {"KIND": f"int{w.bits}", "SIZE": 0 if w.is_by_channel else w.group_size}, w.values, w.scales


def hidden_grad(
    dy: Tensor,
    row_index_R: Tensor | None,
    offsets_E: Tensor,
    gates_R: Tensor,
    w_out: Tensor,
    b_out: Tensor | None,
    pre: Tensor,
    pre_gate: Tensor | None,
    activation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the pre-activations' gradients and the hidden rows, both times the gates, and the gates' gradient."""
    (E, F, N), R = w_out.shape, gates_R.shape[0]
    dpre, weighted = torch.empty_like(pre), torch.empty_like(pre)
    dpre_gate = dy.new_empty(0, F) if pre_gate is None else torch.empty_like(pre_gate)
    constants = {"ACT": activation, "GATHER": row_index_R is not None, "GATED": pre_gate is not None}
    index = _or(row_index_R, offsets_E)
    (tile,) = tiles("hidden_grad", (N, F), dy.dtype, R / E)
    parts = -(-F // tile.n)
    partial = dy.new_empty(R, parts, dtype=torch.float32)
    pointers = (dy, index, offsets_E, w_out, gates_R, pre, _or(pre_gate, pre), dpre, dpre_gate, weighted, partial)
    _by_rows("products.hidden_grad", "hidden_grad", pointers, constants, (E, N, F), R, dy)
    dgates_R = torch.zeros_like(gates_R)
    height = 16 if interpreted() else 32
    Launch(
        "sums.gate_grad",
        (partial, dy, _or(b_out, dy), index, offsets_E, dgates_R, parts, N, E),
        {
            "GATHER": row_index_R is not None,
            "BIAS": b_out is not None,
            "UNIT": math.gcd(N, 16),
            "E_POW2": power_of_two(E),
            "PARTS_POW2": power_of_two(parts),
            "BLOCK_M": height,
            "BLOCK_N": 64,
        },
        lambda _: _tiles_m(R, E, height),
    ).run()
    return dpre, dpre_gate, weighted, dgates_R


def weight_grad(
    left: Tensor,
    right: Tensor,
    offsets_E: Tensor,
    *,
    left_index_R: Tensor | None = None,
    right_index_R: Tensor | None = None,
) -> Tensor:
    """Return ``left^T right`` over the rows of each expert, (E, M, N); one of the two may be gathered by its index."""
    E, M, N = offsets_E.shape[0], left.shape[1], right.shape[1]
    R = next((i.shape[0] for i in (left_index_R, right_index_R) if i is not None), left.shape[0])
    dw = left.new_empty(E, M, N)
    index = left_index_R if right_index_R is None else right_index_R
    gathers = {"GATHER_LEFT": left_index_R is not None, "GATHER_RIGHT": right_index_R is not None}

    def grid(tile: Tile | None) -> int:
        assert tile is not None
        return E * -(-M // tile.m) * -(-N // tile.n)

    Launch(
        "products.weight_grad",
        (left, right, _or(index, offsets_E), offsets_E, dw, M, N),
        {**gathers, **_flags(left)},
        grid,
        ("weight_grad", (E, M, N), left.dtype, R / max(E, 1)),
    ).run()
    return dw


def column_sums(
    x: Tensor, offsets_E: Tensor, gates_R: Tensor | None = None, row_index_R: Tensor | None = None
) -> Tensor:
    """Return the sum of the (gated) rows of each expert, float32 (E, N)."""
    E, N = offsets_E.shape[0], x.shape[1]
    width = 32 if interpreted() else 64
    out = x.new_empty(E, N, dtype=torch.float32)
    Launch(
        "sums.column_sums",
        (x, _or(gates_R, x), _or(row_index_R, offsets_E), offsets_E, out, N),
        {
            "GATHER": row_index_R is not None,
            "WEIGHTED": gates_R is not None,
            "UNIT": math.gcd(N, 16),
            "BLOCK_K": 16 if interpreted() else ROWS_AT_A_TIME,
            "BLOCK_N": width,
        },
        lambda _: E * -(-N // width),
    ).run()
    return out


def _by_rows(
    kernel: str,
    tuned_as: str,
    pointers: tuple[Tensor, ...],
    constants: Mapping[str, object],
    shape: tuple[int, int, int],
    rows: int,
    like: Tensor,
) -> None:
    """Launch a kernel over tiles of ``rows`` rows; ``shape`` is E, the width summed over and the output's width."""
    E, summed, width = shape

    def grid(tile: Tile | None) -> int:
        assert tile is not None
        total = _tiles_m(rows, E, tile.m) * -(-width // tile.n)
        return programs(total, like, tile, 2 if tuned_as in ("up_geglu", "up_swiglu") else 1)

    by_shape = {"EVEN_K": summed % block_k(like.dtype) == 0, "E_POW2": power_of_two(E), **_flags(like)}
    tile = (tuned_as, shape, like.dtype, rows / max(E, 1))
    Launch(kernel, (*pointers, summed, width, E, rows), {**constants, **by_shape}, grid, tile).run()


def _or(tensor: Tensor | None, other: Tensor) -> Tensor:
    """Return ``tensor``, or without one a pointer for a parameter that the kernel does not read."""
    return other if tensor is None else tensor
