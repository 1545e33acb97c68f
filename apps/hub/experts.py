"""The kernels as an experts implementation of transformers."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from apps.hub.transformers_internals import apply_gate, has_plain_gate
from core.adopted.layouts import ACTIVATIONS
from core.kernels import FFNWeights, RowIndex, combine, count_experts, expert_ffn, expert_linear, sort_pairs

NAME = "moesaic"


def register() -> str:
    """Enter the kernels into transformers' experts implementations, and return their name, "moesaic".

    Example::

        model = AutoModelForCausalLM.from_pretrained(folder, experts_implementation=apps.hub.register())

    Raises:
        ImportError: transformers is not installed.
    """
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
    return NAME


def experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Return the weighted sum of each token's experts, (T, D), as every experts implementation of transformers does.

    Args:
        self: experts that transformers' ``use_experts_implementation`` decorates.
        hidden_states: (T, D).
        top_k_index: int64 (T, K); the number of experts marks a pair that another rank computes.
        top_k_weights: (T, K).
    """
    T, K = top_k_index.shape
    ids_N = top_k_index.reshape(-1)
    placed = sort_pairs(ids_N, count_experts(ids_N, self.num_experts))
    token_R, gates_R = placed.order_R // K, top_k_weights.reshape(-1).index_select(0, placed.order_R).float()
    rows = RowIndex(token_R, placed.offsets_E, placed.inverse_N, K)
    up, down = (self.gate_up_proj if self.has_gate else self.up_proj), self.down_proj
    if not self.is_transposed:
        up, down = up.transpose(1, 2), down.transpose(1, 2)
    activation = _fused(self)
    if activation is not None:
        gate, into = up.chunk(2, 2) if self.has_gate else (None, up)  # two chunks would be two gradients of all experts
        weights = FFNWeights(into, down, None, None, gate)
        return expert_ffn(hidden_states, rows, gates_R, weights, activation).to(hidden_states.dtype)
    up_bias = getattr(self, "gate_up_proj_bias" if self.has_gate else "up_proj_bias") if self.has_bias else None
    hidden = expert_linear(hidden_states.index_select(0, token_R), up, placed.offsets_E, up_bias)
    hidden = apply_gate(self, hidden) if self.has_gate else self.act_fn(hidden)
    out = expert_linear(hidden, down, placed.offsets_E, self.down_proj_bias if self.has_bias else None)
    if self.has_post_expert_norm:
        out = self.post_expert_norm(out)
    return combine(out, rows, gates_R, T).to(hidden_states.dtype)


def _fused(experts: Any) -> str | None:
    """Return the activation with which one kernel computes all of the experts, or None if it cannot."""
    fits = (
        has_plain_gate(experts) and experts.is_concatenated and not (experts.has_bias or experts.has_post_expert_norm)
    )
    return ACTIVATIONS.get(type(experts.act_fn).__name__) if fits else None
