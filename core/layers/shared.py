"""``SharedGate``: how the shared experts and the routed path of a layer share a token."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels import outside_autocast
from ..routing.gates import LinearGate, widened

KINDS = ("mix", "scale")


class SharedGate(LinearGate):
    """A sigmoid gate per token, ``g = sigmoid(x w)``, between the routed output r and the shared experts' output s.

    "mix" is ``(1 - g) s + g r`` (NLLB's conditional routing, arXiv 2207.04672), "scale" is ``r + g s`` (Qwen-MoE).

    Args:
        dim: D.
        kind: "mix" or "scale".
        dropout: probability, with "mix" in training, that a token's g is 0. The others are not rescaled: g is a share.

    Attributes:
        terms: the balance terms that apply to it.
    """

    def __init__(self, dim: int, kind: str, dropout: float = 0.0) -> None:
        super().__init__(dim, 1)
        self.kind, self.dropout = kind, dropout
        self.terms = frozenset({"gate_budget"} if kind == "mix" else ())

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """Return the gates of (..., D) tokens before dropout: float32 (...), or float64 for a float64 model."""
        with outside_autocast(x.device):
            logits_T1 = super().forward(*widened(x.reshape(-1, x.shape[-1])))
            return logits_T1.view(x.shape[:-1]).sigmoid()

    def combine(self, gate: Tensor, routed: Tensor, shared: Tensor) -> Tensor:
        """Return the layer's output, in the dtype of ``routed``.

        Args:
            gate: (...), from ``forward``.
            routed, shared: (..., D_out).
        """
        if self.kind == "mix":
            if self.training and self.dropout:
                gate = gate.masked_fill(torch.rand_like(gate) < self.dropout, 0.0)
            gate = gate.unsqueeze(-1)
            return ((1 - gate) * shared + gate * routed).to(routed.dtype)
        return (routed + gate.unsqueeze(-1) * shared).to(routed.dtype)

    def extra_repr(self) -> str:
        return f"kind={self.kind}, dropout={self.dropout}"
