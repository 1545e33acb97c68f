"""MoE layers as onnxruntime's own operators, ``com.microsoft::MoE``, ``QMoE`` and ``MatMulNBits``.

The first two choose the k best of a softmax and weight by it. Ours is the choice all the same: they are given the
logarithms of the gates, 0 for the experts that a token does not take, so that their softmax gives the gates back over
their sum, by which the output is multiplied. They do not compute pairs of weight 0.

``QMoE`` computes quantized experts, and ``MatMulNBits`` one product of theirs. Only what keeps the tokens in float32 is
used. On a processor onnxruntime 1.32 does so for 4 bits, and in ``QMoE`` for 8 bits with one scale per channel; in 8
bits by blocks ``QMoE`` rounds the tokens to 8 bits as well (1 % off), and ``MatMulNBits`` dequantizes in each call.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import core
from core.dispatch import Dispatcher
from core.experts.clamped import ClampedSwiGLUExperts
from core.experts.ffn import FFNExperts
from core.experts.matrices import QuantizedMatrices
from core.kernels.quantized import QuantizedWeight, whole_numbers

from .standard import Writer, chain_of

ACTIVATIONS = {"relu": "relu", "silu": "silu", "gelu_tanh": "gelu"}
"""onnxruntime's names of the activations that it computes as we do."""
DOMAIN = "com.microsoft"
LEAST_BLOCK, LARGEST_BLOCK = 16, 128
"""Inputs of a channel that share a scale in onnxruntime's operators: powers of two. 32 and 128 take the same time."""


def misfit(layer: core.MoELayer) -> str | None:
    """Return why none of onnxruntime's operators computes the experts of a layer; None if one does."""
    return None if goes_by_blocks(layer) else _operator_misfit(layer)


def goes_by_blocks(layer: core.MoELayer) -> bool:
    """Return whether ``MatMulNBits`` takes the matrices of a plain MoE layer's experts, of whatever kind they are."""
    matrices = [m.weight for m in layer.experts.modules() if isinstance(m, QuantizedMatrices)]
    fits = bool(matrices) and all(w.bits == 4 and _block(w) is not None for w in matrices)
    return fits and type(layer) is core.MoE


def _operator_misfit(layer: core.MoELayer) -> str | None:
    """Return why neither ``MoE`` nor ``QMoE`` computes a layer; None if one does."""
    if type(layer) is not core.MoE:
        return f"{type(layer).__name__} is no plain MoE layer"
    experts, name = layer.experts, type(layer.experts).__name__
    if layer.router.gates_on == "input":
        return "its gates scale the experts' input"
    if not isinstance(experts, (FFNExperts, ClampedSwiGLUExperts)):
        return f"its experts are {name}"
    if experts.is_quantized and (reason := _quantized_misfit(_matrices(experts))) is not None:
        return reason
    if experts.w_in.shape[1] != experts.w_out.shape[2]:
        return f"its output is {experts.w_out.shape[2]} wide, its input {experts.w_in.shape[1]}"
    if isinstance(experts, FFNExperts):
        if experts.w_gate is not None and experts.activation != "silu":
            return f"its experts are gated by {experts.activation}, not silu"
        if experts.w_gate is None and experts.activation not in ACTIVATIONS:
            return f"onnxruntime has no activation {experts.activation!r}"
    return None


def _quantized_misfit(matrices: list[QuantizedWeight]) -> str | None:
    """Return why ``QMoE`` takes no such matrices, or not in float32; None if it does."""
    for w in matrices:
        if w.bits == 8 and not w.is_by_channel:
            return "its experts have 8 bits and several scales a channel: onnxruntime would round the tokens too"
        if w.bits == 4 and w.fan_in % 2:
            return f"its experts have 4 bits and {w.fan_in} inputs, and onnxruntime takes an even number"
        if w.bits == 4 and not w.is_by_channel and _block(w) is None:
            return f"its experts share scales among {w.group_size} inputs, which is no multiple of {LEAST_BLOCK}"
    return None


def _matrices(experts: FFNExperts | ClampedSwiGLUExperts) -> list[QuantizedWeight]:
    stacked: tuple[Any, ...] = (experts.w_in, experts.w_out, experts.w_gate)
    return [w.weight for w in stacked if isinstance(w, QuantizedMatrices)]


def _block(w: QuantizedWeight) -> int | None:
    """Return the inputs of a block of onnxruntime's by which matrices are laid out; None if there is none.

    One of our scales covers several blocks. A channel with one scale may end inside of a block.
    """
    block = min(w.group_size & -w.group_size, LARGEST_BLOCK)  # the largest power of two that divides the group
    return max(block, LEAST_BLOCK) if block >= LEAST_BLOCK or w.is_by_channel else None


def _scales_of_blocks(w: QuantizedWeight, block: int) -> Tensor:
    """Return the scales of all blocks, (E, blocks, N)."""
    group_of_block = torch.arange(-(-w.fan_in // block)) * block // w.group_size
    return w.scales[:, group_of_block]


def _packed(q: Tensor, bits: int) -> Tensor:
    """Return integers (..., K) as onnxruntime reads them, uint8 (..., K), or in 4 bits two to a byte."""
    u = (q.to(torch.int16) + 2 ** (bits - 1)).to(torch.uint8)
    return u if bits == 8 else u[..., ::2] | u[..., 1::2] << 4


def by_blocks(writer: Writer, name: str, x: Any, w: QuantizedWeight, *bias: Any) -> Any | None:
    """Write ``x w + b`` as ``MatMulNBits`` that keeps x in float32; return None if it does not take w."""
    block = _block(w)
    if w.bits != 4 or block is None:
        return None
    (K, N), blocks = w.shape[1:], -(-w.fan_in // block)
    q_NK = nn.functional.pad(whole_numbers(w.values, K)[0].t(), (0, blocks * block - K))
    values = writer.constant(name, _packed(q_NK, 4).unflatten(1, (blocks, block // 2)).contiguous())
    scales = writer.constant(f"{name}.scales", _scales_of_blocks(w, block)[0].t().contiguous())
    attributes = {"K": K, "N": N, "bits": 4, "block_size": block, "accuracy_level": 1}  # 1: x stays as it is
    none = (None, None) if bias else ()  # zero points, and an input of old
    return writer.add("MatMulNBits", x, values, scales, *none, *bias, domain=DOMAIN, **attributes)


@dataclass(frozen=True)
class _Chosen:
    """The dispatcher's own notes: gates (T, E), zero for experts not chosen, and the largest count per token."""

    gates_TE: Tensor
    top_k: int


class _Gates(Dispatcher):
    """A dispatcher that moves no tokens: it says the weight of each expert for each token."""

    def __init__(self, num_experts: int) -> None:
        self.num_experts = num_experts

    def dispatch(self, x: Tensor, routing: Any) -> core.Rows:
        E, T = self.num_experts, routing.num_tokens
        # Pairs that are not computed have the expert E.
        place_N = routing.token_index_N * (E + 1) + routing.expert_ids_N
        gates = routing.gates_N.new_zeros(T * (E + 1)).scatter_add(0, place_N, routing.gates_N)
        chosen = _Chosen(gates.view(T, E + 1)[:, :E], min(routing.top_k or E, E))
        return core.Rows(
            x=x,
            row_index_R=routing.token_index_N,
            offsets_E=routing.tokens_per_expert_E,
            gates_R=routing.gates_N,
            num_tokens=T,
            plan=chosen,
        )

    def combine(self, rows: core.Rows) -> Tensor:
        return rows.x


class _Operator(nn.Module):
    """The experts of a layer as one operator of onnxruntime, with their weights in its layout."""

    def __init__(self, experts: FFNExperts | ClampedSwiGLUExperts) -> None:
        super().__init__()
        self.num_experts, self.reads_context = experts.num_experts, False
        self.attributes: dict[str, Any] = {"normalize_routing_weights": 1}
        if experts.w_gate is None:
            self.attributes["activation_type"] = ACTIVATIONS[str(experts.activation)]
        else:
            self.attributes |= {"activation_type": "swiglu", "swiglu_fusion": 1, **_curve(experts)}
        bias: Tensor | None = experts.b_in
        gate, b_gate = experts.w_gate, getattr(experts, "b_gate", None)
        if gate is not None and bias is not None:
            bias = torch.stack((torch.zeros_like(bias) if b_gate is None else b_gate, bias), 2).flatten(1)
        self.fc1_bias = None if bias is None else bias.detach()
        self.fc2_bias = None if experts.b_out is None else experts.b_out.detach()
        matrices = _matrices(experts)
        self.operator = "QMoE" if matrices else "MoE"
        if not matrices:
            self.fc1, self.fc2 = _of_channels(experts.w_in, gate), _of_channels(experts.w_out)
            return
        bits, block = matrices[0].bits, None
        blocks = [b for w in matrices if (b := _block(w)) is not None and w.fan_in % b == 0]
        if bits == 4 and len(blocks) == len(matrices):
            block = min(blocks)
            self.attributes["block_size"] = block
        self.attributes["expert_weight_bits"] = bits

        def values_of(w: QuantizedWeight) -> Tensor:
            return whole_numbers(w.values, w.fan_in)

        def scales_of(w: QuantizedWeight) -> Tensor:
            return w.scales if block is None else _scales_of_blocks(w, block)

        w_in, w_out, *w_gate = matrices
        self.fc1 = _packed(_of_channels(values_of(w_in), *map(values_of, w_gate)), bits)
        self.fc2 = _packed(_of_channels(values_of(w_out)), bits)
        scales = _of_channels(scales_of(w_in), *map(scales_of, w_gate)), _of_channels(scales_of(w_out))
        self.fc1_scales, self.fc2_scales = scales if block is not None else (s.squeeze(2) for s in scales)

    def forward(self, rows: core.Rows) -> core.Rows:
        gates_TE, top_k = rows.plan.gates_TE, rows.plan.top_k
        total_T1 = gates_TE.sum(-1, keepdim=True)
        # For a token without experts the logarithms would not be numbers; its output is multiplied by 0.
        logits_TE = torch.where(total_T1 > 0, gates_TE, 1.0).log().to(rows.x.dtype)
        scales = [[self.fc1_scales], [self.fc2_scales]] if self.operator == "QMoE" else [[], []]
        y_TD = torch.onnx.ops.symbolic(
            f"{DOMAIN}::{self.operator}",
            (rows.x, logits_TE, self.fc1, *scales[0], self.fc1_bias, self.fc2, *scales[1], self.fc2_bias),
            {"k": top_k, **self.attributes},
            dtype=rows.x.dtype,
            shape=rows.x.shape,
            version=1,
        )
        return rows.with_output(y_TD * total_T1.to(y_TD.dtype), combined=True)


def _of_channels(w: Tensor, gate: Tensor | None = None) -> Tensor:
    """Return stacked tensors (E, K, N) with one row per channel, (E, N, K): alternately a row of the gate and a row
    that it scales."""
    rows = w.detach().transpose(1, 2)
    if gate is not None:
        rows = torch.stack((gate.detach().transpose(1, 2), rows), 2).flatten(1, 2)
    return rows.contiguous()


def _curve(experts: FFNExperts | ClampedSwiGLUExperts) -> dict[str, float]:
    """Return the attributes of a gated activation, ``min(g, limit) * sigmoid(alpha * g) * (u + beta)``."""
    if isinstance(experts, FFNExperts):
        return {"activation_alpha": 1.0, "activation_beta": 0.0}
    curve = {"activation_alpha": float(experts.alpha), "activation_beta": float(experts.shift)}
    return curve if experts.limit is None else {**curve, "swiglu_limit": float(experts.limit)}


def parts_of(layer: core.MoE, by_step: bool) -> tuple[nn.Module, Dispatcher] | None:
    """Return the parts that make a layer one operator, onnxruntime's where it fits; None: the layer keeps its own.

    Args:
        layer: the layer.
        by_step: whether the graph continues from a past, with a few tokens per call: ``QMoE`` starts faster than a
            matmul for each expert, which counts there. With many tokens ``by_blocks`` is faster.
    """
    if _operator_misfit(layer) is None and (by_step or not goes_by_blocks(layer)):
        assert isinstance(layer.experts, (FFNExperts, ClampedSwiGLUExperts))
        return _Operator(layer.experts), _Gates(layer.num_experts)
    return chain_of(layer)
