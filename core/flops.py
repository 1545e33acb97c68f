"""FLOP formulas for ``torch.utils.flop_counter``, which counts 0 for custom ops, ``grouped_mm``, attention on CPU,
fused recurrent layers and matrix-vector products.

Two FLOPs per multiply-add, matmuls only. Rows are those really computed, read from the offsets; if offsets are fake
(tracing) every routed pair counts. The formulas are registered with the first layer that is built, so that a counter of
the user's own knows them, and not at import: torch's module imports Triton, which takes as long as half of torch.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .kernels import cpu, grouped, triton_ops  # noqa: F401  their custom ops are registered on import
from .torch_internals import FakeTensor, flop_counter, fused_attention, fused_recurrent, onednn


def count_flops(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> int:
    """Return the FLOPs of one call of ``fn``: matmuls only, two per multiply-add."""
    register_formulas()
    fused = torch.backends.mha.get_fastpath_enabled()  # torch's fused encoder layers count no FLOPs
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        # Under a counter compiled code would run op by op, each compiled by itself.
        with torch.compiler.set_stance("force_eager"), flop_counter() as counter:
            fn(*args, **kwargs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    return int(counter.get_total_flops())


@functools.cache
def register_formulas() -> None:
    """Tell torch's FLOP counter of these operations, once. Counters that are made later know them."""
    from torch.utils.flop_counter import register_flop_formula

    ops = torch.ops.moesaic
    experts = [ops.cpu_expert_ffn, ops.triton_expert_ffn]
    backwards = [ops.cpu_expert_ffn_backward, ops.triton_expert_ffn_backward]
    register_flop_formula(experts, get_raw=True)(_expert_ffn)
    register_flop_formula(backwards, get_raw=True)(_expert_ffn_backward)
    register_flop_formula([ops.grouped_mm, ops.triton_linear], get_raw=True)(_grouped)
    register_flop_formula([ops.quantized_mm, ops.triton_quantized_linear], get_raw=True)(_quantized)
    register_flop_formula(ops.triton_quantized_ffn, get_raw=True)(_quantized_ffn)
    register_flop_formula([ops.grouped_mm_dw, ops.triton_linear_dw], get_raw=True)(_grouped_dw)
    if (fused_linear := onednn("linear_pointwise")) is not None:
        register_flop_formula(fused_linear)(_linear)
    register_flop_formula(fused_attention("flash_attention_for_cpu"))(_attention)
    register_flop_formula(fused_attention("flash_attention_for_cpu_backward"))(_attention_backward)
    aten = torch.ops.aten
    register_flop_formula(aten.mkldnn_rnn_layer)(lambda x, *weights, **_: _recurrent(x, weights[:2]))
    register_flop_formula(fused_recurrent())(lambda x, weights, *_, **__: _recurrent(x, weights))
    register_flop_formula(aten.mv)(lambda matrix, *_, **__: 2 * math.prod(matrix))
    register_flop_formula(aten.addmv)(lambda _, matrix, *__, **___: 2 * math.prod(matrix))


def _rows(offsets_E: Tensor, upper: int) -> int:
    return upper if isinstance(offsets_E, FakeTensor) or offsets_E.is_meta else int(offsets_E[-1])


def _expert_ffn(x, row_index_R, offsets_E, gates_R, w_in, w_out, b_in, b_out, w_gate, *args, out_val=None, **kwargs):
    _, D, F = w_in.shape
    return 2 * _rows(offsets_E, gates_R.shape[0]) * F * (D * (1 if w_gate is None else 2) + w_out.shape[-1])


def _expert_ffn_backward(
    dy, x, row_index_R, offsets_E, gates_R, w_in, w_out, b_in, b_out, w_gate, *args, out_val=None, **kwargs
):
    (_, D, F), N = w_in.shape, w_out.shape[-1]
    *wanted_x, wanted_in, wanted_out, _, _, wanted_gate = args[-1]
    # On CPU the gradient of x is always computed.
    inputs = N + (D * (1 if w_gate is None else 2) if all(wanted_x) else 0)
    return 2 * _rows(offsets_E, gates_R.shape[0]) * F * (inputs + D * (wanted_in + wanted_gate) + N * wanted_out)


def _linear(x_shape, weight_shape, *args, out_shape=None, **kwargs):
    return 2 * math.prod(x_shape) * weight_shape[0]


def _recurrent(x_shape, weight_shapes):
    # Each step multiplies an input or a state by every matrix.
    return 2 * math.prod(x_shape[:-1]) * sum(math.prod(shape) for shape in weight_shapes if len(shape) == 2)


def _grouped(x_R, w, offsets_E, *args, out_val=None, **kwargs):
    return 2 * _rows(offsets_E, x_R.shape[0]) * w.shape[1] * w.shape[2]


def _quantized(x_R, values, scales, fan_in, offsets_E, *args, out_val=None, **kwargs):
    return 2 * _rows(offsets_E, x_R.shape[0]) * fan_in * scales.shape[2]


def _quantized_ffn(
    x, row_index_R, offsets_E, gates_R, in_values, in_scales, out_values, out_scales, gate_values, *args, **kwargs
):
    D, F, N = x.shape[1], in_scales.shape[2], out_scales.shape[2]
    return 2 * _rows(offsets_E, gates_R.shape[0]) * F * (D * (1 if gate_values is None else 2) + N)


def _grouped_dw(x_R, dy_R, offsets_E, wants=(True, False), *, out_val=None, **kwargs):
    if not wants[0]:
        return 0
    return 2 * _rows(offsets_E, x_R.shape[0]) * x_R.shape[1] * dy_R.shape[1]


def _attention(query_shape, key_shape, value_shape, *args, out_shape=None, **kwargs):
    # Two matmuls, q k^T and scores v; a causal mask still computes both triangles here.
    *batch, length, width = query_shape
    return 2 * math.prod(batch) * length * key_shape[-2] * (width + value_shape[-1])


def _attention_backward(grad_shape, query_shape, key_shape, value_shape, *args, out_shape=None, **kwargs):
    # Scores once more, then dv, dscores, dq and dk.
    *batch, length, width = query_shape
    return 2 * math.prod(batch) * length * key_shape[-2] * (3 * width + 2 * value_shape[-1])
