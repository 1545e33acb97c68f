"""Gated experts whose halves are clamped and biased, as in GPT-OSS and DeepSeek-V4."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import MappingProxyType

import torch
from torch import Tensor, nn

from ..contract import Rows
from ..fields import Count, Positive
from ..kernels import expert_linear, outside_autocast
from .base import ExpertConfig, Experts
from .products import autocast_together, first_linear, init_linear_, merged_linear, next_linear, weighted_sum


class ClampedSwiGLUExperts(Experts):
    """E networks ``((u + shift) * g * sigmoid(alpha g)) w_out + b_out``, with ``g = min(x w_gate + b_gate, limit)`` and
    ``u = x w_in + b_in`` clamped to ``[-limit, limit]``.

    Parameters: ``w_in``, ``w_gate`` (E, D, F), ``w_out`` (E, F, D_out); with bias ``b_in``, ``b_gate`` (E, F) and
    ``b_out`` (E, D_out).
    """

    hidden_axes = MappingProxyType({"w_in": 2, "w_gate": 2, "b_in": 1, "b_gate": 1, "w_out": 1})
    linear_in = frozenset({"w_out", "b_out"})

    def __init__(self, config: ClampedSwiGLU, num_experts: int, dim: int, out_dim: int) -> None:
        super().__init__()
        hidden_dim, bias = config.hidden(dim), config.bias
        self.num_experts, self.limit, self.alpha, self.shift = num_experts, config.limit, config.alpha, config.shift
        self.w_in = nn.Parameter(torch.empty(num_experts, dim, hidden_dim))
        self.w_out = nn.Parameter(torch.empty(num_experts, hidden_dim, out_dim))
        self.w_gate = nn.Parameter(torch.empty(num_experts, dim, hidden_dim))
        self.b_in = nn.Parameter(torch.empty(num_experts, hidden_dim)) if bias else None
        self.b_out = nn.Parameter(torch.empty(num_experts, out_dim)) if bias else None
        self.b_gate = nn.Parameter(torch.empty(num_experts, hidden_dim)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start each expert as ``nn.Linear`` does: U(-1/sqrt(fan_in), 1/sqrt(fan_in))."""
        for weight, bias in ((self.w_in, self.b_in), (self.w_gate, self.b_gate), (self.w_out, self.b_out)):
            init_linear_(weight, bias)

    def biases(self) -> list[Tensor]:
        return [b for b in (self.b_in, self.b_out, self.b_gate) if b is not None]

    def _weights(self) -> tuple[Tensor | None, ...]:
        return self.w_in, self.w_out, self.w_gate, self.b_in, self.b_out, self.b_gate

    def _gated(self, gate: Tensor, up: Tensor) -> Tensor:
        """Return the hidden layer of both halves, any shape."""
        if self.limit is not None:
            gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return (up + self.shift) * (gate * torch.sigmoid(self.alpha * gate))

    def compute_rows(self, rows: Rows) -> Rows:
        x, w_in, w_out, w_gate, b_in, b_out, b_gate = autocast_together(rows.x, *self._weights())
        offsets_E, backend = rows.offsets_E, self.backend
        # Rows past the last offset are zero after each product, and so is their hidden layer: 0 * sigmoid(0).
        gate_RF = expert_linear(x, w_gate, offsets_E, b_gate, backend=backend)
        h_RF = self._gated(gate_RF, expert_linear(x, w_in, offsets_E, b_in, backend=backend))
        return rows.with_output(expert_linear(h_RF, w_out, offsets_E, b_out, backend=backend))

    def compute_each(self, x: Tensor, counts: tuple[int, ...] | None = None, real_T: Tensor | None = None) -> Tensor:
        counts = (self.num_experts,) if counts is None else counts
        n, x = sum(counts), x if x.ndim == 3 else x.unsqueeze(0)
        taken = (None if w is None else w[:n] for w in self._weights())
        x, w_in, w_out, w_gate, b_in, b_out, b_gate = autocast_together(x, *taken)
        h_TnF = self._gated(first_linear(x, w_gate, b_gate, counts), first_linear(x, w_in, b_in, counts))
        return next_linear(h_TnF, w_out, b_out)

    def compute_merged(self, x: Tensor, weights: Tensor) -> Tensor:
        # As in ``FFNExperts``: the sum in the parameters' own dtype.
        with outside_autocast(x.device):
            mixed = [weighted_sum(weights, w) for w in self._weights()]
        x, w_in, w_out, w_gate, b_in, b_out, b_gate = autocast_together(x, *mixed)
        h = self._gated(merged_linear(x, w_gate, b_gate), merged_linear(x, w_in, b_in))
        return merged_linear(h, w_out, b_out)

    def extra_repr(self) -> str:
        E, D, H = self.w_in.shape
        gate = f"limit={self.limit}, alpha={self.alpha}, shift={self.shift}"
        return f"num_experts={E}, dim={D}, hidden_dim={H}, {gate}, backend={self.backend}"


@dataclass(frozen=True)
class ClampedSwiGLU(ExpertConfig):
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
        shift: what is added to u, so that a layer whose u is 0 passes its gate on.

    Raises:
        ValueError: ``hidden_dim`` below 1, or a ``limit`` or ``alpha`` that is not positive.
    """

    hidden_dim: Count | None = None
    bias: bool = False
    limit: Positive | None = 7.0
    alpha: Positive = 1.0
    shift: float = 0.0

    def hidden(self, dim: int) -> int:
        """Return F for this model dim, the default filled in."""
        return -(-8 * dim // 24) * 8 if self.hidden_dim is None else self.hidden_dim

    def narrowed(self, times: int, dim: int | None = None) -> ClampedSwiGLU:
        if dim is None and self.hidden_dim is None:
            return self
        return replace(self, hidden_dim=self.divided(self.hidden(dim or 0), times))

    def build(self, num_experts: int, dim: int, out_dim: int | None = None) -> ClampedSwiGLUExperts:
        return ClampedSwiGLUExperts(self, num_experts, dim, dim if out_dim is None else out_dim)

    def num_params(self, dim: int, out_dim: int | None = None) -> int:
        hidden, out_dim = self.hidden(dim), dim if out_dim is None else out_dim
        return hidden * (2 * dim + out_dim) + (2 * hidden + out_dim if self.bias else 0)

    def flops_per_row(self, dim: int, out_dim: int | None = None) -> int:
        return 2 * self.hidden(dim) * (2 * dim + (dim if out_dim is None else out_dim))
