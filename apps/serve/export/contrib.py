"""MoE layers as onnxruntime's own operator, ``com.microsoft::MoE``.

The operator chooses the k best of a softmax and weights by it. Ours is the choice all the same: it is given the
logarithms of the gates, 0 for the experts that a token does not take, so that its softmax gives the gates back over
their sum, by which the output is multiplied. What it does not weight it does not compute.
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

ACTIVATIONS = {"relu": "relu", "silu": "silu", "gelu_tanh": "gelu"}
"""onnxruntime's names of the activations that it computes as we do."""


def misfit(layer: core.MoELayer) -> str | None:
    """Return why onnxruntime's operator cannot compute a layer; None where it can."""
    if type(layer) is not core.MoE:
        return f"{type(layer).__name__} is no plain MoE layer"
    experts, name = layer.experts, type(layer.experts).__name__
    if layer.router.gates_on == "input":
        return "its gates scale the experts' input"
    if not isinstance(experts, (FFNExperts, ClampedSwiGLUExperts)):
        return f"its experts are {name}"
    if experts.is_quantized:
        return "its experts are quantised"
    if experts.w_in.shape[1] != experts.w_out.shape[2]:
        return f"its output is {experts.w_out.shape[2]} wide, its input {experts.w_in.shape[1]}"
    if isinstance(experts, FFNExperts):
        if experts.w_gate is not None and experts.activation != "silu":
            return f"its experts are gated by {experts.activation}, not silu"
        if experts.w_gate is None and experts.activation not in ACTIVATIONS:
            return f"onnxruntime has no activation {experts.activation!r}"
    return None


@dataclass(frozen=True)
class _Chosen:
    """The notes of the dispatcher for itself: gates (T, E), zero for what is not chosen, and the most of a token."""

    gates_TE: Tensor
    top_k: int


class _Gates(Dispatcher):
    """A dispatcher that moves no tokens: it says what each token takes of each expert."""

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
        fc1 = experts.w_in.detach().transpose(1, 2)
        bias: Tensor | None = experts.b_in
        if experts.w_gate is None:
            self.attributes["activation_type"] = ACTIVATIONS[str(experts.activation)]
        else:  # a row of the gate, then one of what it scales
            fc1 = torch.stack((experts.w_gate.detach().transpose(1, 2), fc1), 2).flatten(1, 2)
            if bias is not None:
                b_gate = getattr(experts, "b_gate", None)
                bias = torch.stack((torch.zeros_like(bias) if b_gate is None else b_gate, bias), 2).flatten(1)
            self.attributes |= {"activation_type": "swiglu", "swiglu_fusion": 1, **_curve(experts)}
        self.fc1, self.fc1_bias = fc1.contiguous(), None if bias is None else bias.detach()
        self.fc2 = experts.w_out.detach().transpose(1, 2).contiguous()
        self.fc2_bias = None if experts.b_out is None else experts.b_out.detach()

    def forward(self, rows: core.Rows) -> core.Rows:
        gates_TE, top_k = rows.plan.gates_TE, rows.plan.top_k
        total_T1 = gates_TE.sum(-1, keepdim=True)
        # Of a token without experts the logarithms would be no numbers; its output is multiplied by 0.
        logits_TE = torch.where(total_T1 > 0, gates_TE, 1.0).log().to(rows.x.dtype)
        inputs = (rows.x, logits_TE, self.fc1, self.fc1_bias, self.fc2, self.fc2_bias)
        y_TD = torch.onnx.ops.symbolic(
            "com.microsoft::MoE",
            inputs,
            {"k": top_k, **self.attributes},
            dtype=rows.x.dtype,
            shape=rows.x.shape,
            version=1,
        )
        return rows.with_output(y_TD * total_T1.to(y_TD.dtype), combined=True)


def _curve(experts: FFNExperts | ClampedSwiGLUExperts) -> dict[str, float]:
    """Return the attributes of a gated activation, ``min(g, limit) * sigmoid(alpha * g) * (u + beta)``."""
    if isinstance(experts, FFNExperts):
        return {"activation_alpha": 1.0, "activation_beta": 0.0}
    curve = {"activation_alpha": float(experts.alpha), "activation_beta": float(experts.shift)}
    return curve if experts.limit is None else {**curve, "swiglu_limit": float(experts.limit)}


def operator_of(layer: core.MoE) -> tuple[nn.Module, Dispatcher] | None:
    """Return the parts that make a layer onnxruntime's operator; None where it does not fit."""
    if misfit(layer) is not None:
        return None
    assert isinstance(layer.experts, (FFNExperts, ClampedSwiGLUExperts))
    return _Operator(layer.experts), _Gates(layer.num_experts)
