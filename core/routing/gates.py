"""Tokens to logits, in float32 whatever the model is in (float64 stays): one small module a kind of gate."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def init_gate_(weight: Tensor, init_scale: float) -> None:
    """Truncated normal of variance ``init_scale / fan_in`` (Switch Transformer, arXiv 2101.03961, section 2.4)."""
    std = math.sqrt(init_scale / weight.shape[-1])
    nn.init.trunc_normal_(weight, std=std, a=-2 * std, b=2 * std)


class LinearGate(nn.Module):
    """``logits = x W^T``.

    Args:
        dim: D.
        num_experts: E.
        init_scale: variance of the initial weights times D.
    """

    def __init__(self, dim: int, num_experts: int, init_scale: float = 0.1) -> None:
        super().__init__()
        self.init_scale = init_scale
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        init_gate_(self.weight, self.init_scale)

    def forward(self, x_TD: Tensor) -> Tensor:
        """float32 (T, D) to logits (T, E)."""
        return F.linear(x_TD, self.weight.to(x_TD.dtype))

    def noise_std(self, x_TD: Tensor) -> Tensor | None:
        """Learned standard deviation of the logits' noise, (T, E), or None."""
        return None


class NoisyGate(LinearGate):
    """A linear gate that learns the noise on its logits: ``std = softplus(x W_noise^T)`` (arXiv 1701.06538, eq. 4)."""

    def __init__(self, dim: int, num_experts: int, init_scale: float = 0.1) -> None:
        super().__init__(dim, num_experts, init_scale)
        # Zero weights: every expert starts with the same noise, softplus(0) = 0.69 (appendix A of the paper).
        self.noise_weight = nn.Parameter(torch.zeros(num_experts, dim))

    def noise_std(self, x_TD: Tensor) -> Tensor:
        # Softplus underflows to 0 below -104, and the load loss divides by it.
        return F.softplus(F.linear(x_TD, self.noise_weight.to(x_TD.dtype))).clamp_min(1e-6)
