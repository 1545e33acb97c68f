"""Gated experts whose halves are clamped and biased, as in GPT-OSS and DeepSeek-V4."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..fields import Count, Positive
from .two_layers import TwoLayerConfig, TwoLayerExperts, two_thirds


class ClampedSwiGLUExperts(TwoLayerExperts):
    """E networks ``((u + shift) * g * sigmoid(alpha g)) w_out + b_out``, with ``g = min(x w_gate + b_gate, limit)`` and
    ``u = x w_in + b_in`` clamped to ``[-limit, limit]``.

    Parameters: ``w_in``, ``w_gate`` (E, D, F), ``w_out`` (E, F, D_out); with bias ``b_in``, ``b_gate`` (E, F) and
    ``b_out`` (E, D_out).
    """

    shown = ("limit", "alpha", "shift")

    def __init__(self, config: ClampedSwiGLU, num_experts: int, dim: int, out_dim: int) -> None:
        super().__init__(config, num_experts, dim, out_dim)
        self.limit, self.alpha, self.shift = config.limit, config.alpha, config.shift

    def hidden(self, up: Tensor, gate: Tensor | None) -> Tensor:
        assert gate is not None
        # Rows past the last offset are zero after each product, and so is their hidden layer: 0 * sigmoid(0).
        if self.limit is not None:
            gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return (up + self.shift) * (gate * torch.sigmoid(self.alpha * gate))


@dataclass(frozen=True)
class ClampedSwiGLU(TwoLayerConfig):
    """``((u + shift) * g * sigmoid(alpha g)) w_out + b_out``: SwiGLU with its halves held within limits, which keeps
    single large numbers out of low precision. ``g = min(x w_gate + b_gate, limit)``, ``u = x w_in + b_in`` is clamped
    to ``[-limit, limit]``.

    GPT-OSS (arXiv 2508.10925) has ``ClampedSwiGLU(F, bias=True, alpha=1.702, shift=1.0)``, and DeepSeek-V4's experts
    are ``ClampedSwiGLU(F, limit=10.0)``.

    Attributes:
        hidden_dim: F; None: 8/3 * dim, up to the next multiple of 8, as in ``SwiGLU``.
        bias: with ``b_gate``, ``b_in`` and ``b_out``.
        limit: bound of both halves; None: they have none.
        alpha: slope of the gate's sigmoid; 1 is SiLU, 1.702 comes close to GELU.
        shift: added to u, so that a layer whose u is 0 passes its gate on.

    Raises:
        ValueError: ``hidden_dim`` below 1, or a ``limit`` or ``alpha`` that is not positive.
    """

    experts_class = ClampedSwiGLUExperts

    hidden_dim: Count | None = None
    bias: bool = False
    limit: Positive | None = 7.0
    alpha: Positive = 1.0
    shift: float = 0.0

    def hidden(self, dim: int) -> int:
        return two_thirds(dim) if self.hidden_dim is None else self.hidden_dim

    def tensors(self) -> tuple[str, ...]:
        return ("w_in", "w_out", "w_gate", *(("b_in", "b_out", "b_gate") if self.bias else ()))
