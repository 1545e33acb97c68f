"""Attention experts: each has a query and an output projection of its own, and all share keys and values."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..contract import Rows
from ..fields import Count
from ..kernels import expert_linear
from .base import ExpertConfig, Experts
from .products import autocast_together, init_linear_


class AttentionHeads(Experts):
    """E experts of h attention heads each: the matmuls before and after the attention, which the layer computes.

    Parameters: ``w_q`` (E, D, h * d), ``w_out`` (E, h * d, D_out). An ``AttentionMoE`` asks them twice for the same
    pairs of tokens and experts, by ``experts(rows, "queries")`` and ``experts(rows, "outputs")``.
    """

    shown = ("head_dim", "heads_per_expert")

    def __init__(
        self, num_experts: int, dim: int, head_dim: int, heads_per_expert: int = 1, out_dim: int | None = None
    ) -> None:
        super().__init__()
        out_dim = dim if out_dim is None else out_dim
        self.num_experts, self.head_dim, self.heads_per_expert = num_experts, head_dim, heads_per_expert
        self.w_q = nn.Parameter(torch.empty(num_experts, dim, heads_per_expert * head_dim))
        self.w_out = nn.Parameter(torch.empty(num_experts, heads_per_expert * head_dim, out_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start each matrix as ``nn.Linear`` does: U(-1/sqrt(fan_in), 1/sqrt(fan_in))."""
        init_linear_(self.w_q)
        init_linear_(self.w_out)

    def compute_queries(self, rows: Rows) -> Rows:
        """Return the queries of (R, D) rows, (R, h * d)."""
        return self._product(rows, self.w_q)

    def compute_outputs(self, rows: Rows) -> Rows:
        """Return the outputs of (R, h * d) rows of attended values, (R, D_out)."""
        return self._product(rows, self.w_out)

    def _product(self, rows: Rows, w: Tensor) -> Rows:
        x_RD, w = autocast_together(rows.x, w)
        return rows.with_output(expert_linear(x_RD, w, rows.offsets_E, backend=self.backend))


@dataclass(frozen=True)
class AttentionExperts(ExpertConfig):
    """Mixture of attention heads (MoA, arXiv 2210.05144; JetMoE, arXiv 2404.07413):

        y_t = sum over its experts of g_e(t) softmax(q_e(t) K^T / sqrt(d)) V w_out_e,    q_e(t) = x_t w_q_e

    with keys ``K = X w_k`` and values ``V = X w_v`` that all experts of the layer share. With several heads an expert,
    head j of each expert attends to head j of the keys and values. ``MoEConfig`` builds an ``AttentionMoE``.

    Attributes:
        head_dim: d.
        heads_per_expert: h, which is the number of heads of keys and values too.

    Raises:
        ValueError: a value below 1.
    """

    layer_kind = "attention"

    head_dim: Count = 64
    heads_per_expert: Count = 1

    @property
    def width(self) -> int:
        """The width of an expert's queries, and of the keys and of the values: h * d."""
        return self.heads_per_expert * self.head_dim

    def build(self, num_experts: int, dim: int, out_dim: int | None = None) -> AttentionHeads:
        return AttentionHeads(num_experts, dim, self.head_dim, self.heads_per_expert, out_dim)

    def num_params(self, dim: int, out_dim: int | None = None) -> int:
        return self.width * (dim + (dim if out_dim is None else out_dim))

    def layer_params(self, dim: int) -> int:
        return 2 * dim * self.width

    def layer_flops_per_token(self, dim: int, rows_per_token: float, tokens_per_sequence: int | None) -> float:
        if tokens_per_sequence is None:
            raise ValueError("AttentionExperts needs tokens_per_sequence: attention costs so much a pair of tokens")
        return 2 * self.layer_params(dim) + rows_per_token * 4 * tokens_per_sequence * self.width
