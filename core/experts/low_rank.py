"""Experts for a frozen base: low-rank updates (LoRA) and vectors that scale it ((IA)^3)."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..contract import Rows
from ..fields import Count, Positive, ShareBelowOne
from ..kernels import FFNWeights, RowIndex, combine, expert_ffn, expert_of_rows, outside_autocast
from .base import ExpertConfig, Experts, local_tensor
from .products import autocast_together, first_linear, floats, init_linear_, next_linear, weighted_sum


class LoRAExperts(Experts):
    """E low-rank updates: ``scale * x w_a w_b``. No (D, D_out) matrix is made of the two.

    Parameters: ``w_a`` (E, D, rank) and ``w_b`` (E, rank, D_out), zero at the start.
    """

    shown = ("scale", "dropout")
    takes_index = True
    hidden_axes = MappingProxyType({"w_a": 2, "w_b": 1})
    linear_in = frozenset({"w_b"})

    def __init__(
        self, num_experts: int, dim: int, out_dim: int, rank: int, *, scale: float = 1.0, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.num_experts, self.scale, self.dropout = num_experts, scale, dropout
        self.w_a = nn.Parameter(torch.empty(num_experts, dim, rank))
        self.w_b = nn.Parameter(torch.empty(num_experts, rank, out_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start ``w_b`` at zero, so that the output is zero, and ``w_a`` at U(-1/sqrt(D), 1/sqrt(D))."""
        init_linear_(self.w_a)
        nn.init.zeros_(self.w_b)

    def biases(self) -> list[Tensor]:
        # What has to be zero at the start: else the layer would disturb the frozen base.
        return [self.w_b]

    def _dropped(self, x: Tensor) -> Tensor:
        """Return the tokens with some of their numbers set to zero in training, equally for all experts of a token."""
        return F.dropout(x, self.dropout, self.training) if self.dropout else x

    def compute_rows(self, rows: Rows) -> Rows:
        x, w_a, w_b = autocast_together(self._dropped(rows.x), self.w_a, self.w_b)
        inverse_N, top_k = getattr(rows.plan, "inverse_N", None), getattr(rows.plan, "top_k", None)
        index = RowIndex(None if rows.gathered else rows.row_index_R, rows.offsets_E, inverse_N, top_k)
        # On the gates, one number a row.
        gates_R = rows.gates_R if self.scale == 1.0 else rows.gates_R * self.scale
        y = expert_ffn(x, index, gates_R, FFNWeights(w_a, w_b), "identity", backend=self.backend)
        return rows.with_output(y, weighted=True, combined=not rows.gathered)

    def compute_dense(self, x: Tensor) -> Tensor:
        x, w_a, w_b = autocast_together(self._dropped(x), floats(self.w_a), floats(self.w_b))
        # Experts side by side are one of E times the rank.
        h: Tensor = x @ w_a.transpose(0, 1).flatten(1)
        return h * self.scale @ w_b.flatten(0, 1)

    def compute_each(self, x: Tensor, counts: tuple[int, ...] | None = None, real_T: Tensor | None = None) -> Tensor:
        counts = (self.num_experts,) if counts is None else counts
        n, x = sum(counts), x if x.ndim == 3 else x.unsqueeze(0)
        x, w_a, w_b = autocast_together(self._dropped(x), self.w_a[:n], self.w_b[:n])
        return next_linear(first_linear(x, w_a, None, counts) * self.scale, w_b, None)

    def compute_merged(self, x: Tensor, weights: Tensor) -> Tensor:
        # The sum over experts in the parameters' own dtype: under autocast it is rounded once, after it.
        with outside_autocast(x.device):
            mixed = [weighted_sum(weights, w) for w in (self.w_a, self.w_b)]
        x, w_a, w_b = autocast_together(self._dropped(x), *mixed)
        y: Tensor = x @ w_a * self.scale @ w_b
        return y


@dataclass(frozen=True)
class LoRA(ExpertConfig):
    """``alpha / rank * x w_a w_b``, a low-rank update (LoRA, arXiv 2106.09685), one of many (MoLoRA, arXiv 2309.05444;
    LoRAMoE, arXiv 2312.09979). The layer's output is added to a frozen linear layer's, and is zero at the start.

    ``w_a`` starts at U(-1/sqrt(D), 1/sqrt(D)), as in the authors' code; ``init_each`` leaves ``w_b`` at zero.

    Attributes:
        rank: width between the two matrices.
        alpha: factor on the output, scaled by ``1 / rank``; None: ``rank``, for a factor of 1.
        dropout: probability in training that a number of a token is set to zero on its way into the experts. A token's
            experts get the same ones, so that no token is copied.

    Raises:
        ValueError: ``rank`` below 1, ``alpha`` not positive, ``dropout`` not in [0, 1); in ``build``, ``rank`` above
            the width of the input or of the output, for which a full matrix would be smaller.
    """

    rank: Count = 8
    alpha: Positive | None = None
    dropout: ShareBelowOne = 0.0

    @property
    def scale(self) -> float:
        """Return the factor on the output."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def build(self, num_experts: int, dim: int, out_dim: int | None = None) -> LoRAExperts:
        out_dim = dim if out_dim is None else out_dim
        if self.rank > min(dim, out_dim):
            raise ValueError(f"rank={self.rank} exceeds the smaller of dim={dim} and out_dim={out_dim}")
        return LoRAExperts(num_experts, dim, out_dim, self.rank, scale=self.scale, dropout=self.dropout)

    def num_params(self, dim: int, out_dim: int | None = None) -> int:
        return self.rank * (dim + (dim if out_dim is None else out_dim))


class IA3Experts(Experts):
    """E vectors that scale a token: ``x * v``. No row is copied: a token is scaled by the sum of its gated vectors.

    Parameters: ``v`` (E, D), one at the start.
    """

    takes_index = True
    linear_in = frozenset({"v"})

    def __init__(self, num_experts: int, dim: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.v = nn.Parameter(torch.empty(num_experts, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start at one: if a token's gates sum to 1, the token comes out as it went in."""
        nn.init.ones_(self.v)

    def no_weight_decay(self) -> set[str]:
        """Return the vectors, which do not decay: a factor would go to 0 where it starts at 1."""
        return {"v"}

    def compute_rows(self, rows: Rows) -> Rows:
        v = local_tensor(self.v)
        expert_R = expert_of_rows(rows.gates_R, rows.offsets_E)
        live_R = expert_R < rows.offsets_E.shape[0]
        v_RD = v.index_select(0, expert_R.clamp_max(v.shape[0] - 1))
        if rows.gathered:
            x_RD = torch.where(live_R[:, None], rows.x, 0)  # a row past the last offset may hold NaN
            return rows.with_output((x_RD * v_RD).to(rows.x.dtype))
        index = RowIndex(rows.row_index_R, rows.offsets_E)
        v_TD = combine(v_RD, index, rows.gates_R, rows.num_tokens, backend=self.backend)
        taken_T = torch.zeros(rows.num_tokens, device=rows.x.device).index_add(0, rows.row_index_R, live_R.float()) > 0
        x_TD = torch.where(taken_T[:, None], rows.x, 0)  # padding may hold NaN, and takes no expert
        return rows.with_output((x_TD * v_TD).to(rows.x.dtype), combined=True)

    def compute_dense(self, x: Tensor) -> Tensor:
        return (x * self.v.sum(0)).to(x.dtype)

    def compute_each(self, x: Tensor, counts: tuple[int, ...] | None = None, real_T: Tensor | None = None) -> Tensor:
        counts = (self.num_experts,) if counts is None else counts
        pairs = zip(x if x.ndim == 3 else x.unsqueeze(0), self.v[: sum(counts)].split(counts), strict=True)
        return torch.cat([x_TD[:, None] * v_nD for x_TD, v_nD in pairs], 1).to(x.dtype)

    def compute_merged(self, x: Tensor, weights: Tensor) -> Tensor:
        with outside_autocast(x.device):
            v_GD = weighted_sum(weights, self.v)
        assert v_GD is not None
        return (x * v_GD[:, None]).to(x.dtype)


@dataclass(frozen=True)
class IA3(ExpertConfig):
    """``f(x) = x * v``, a learned vector, one at the start ((IA)^3, arXiv 2205.05638), one of many (MoV, arXiv
    2309.05444). As it is linear in ``v``, experts merged are their weighted outputs: MoV's soft merging by token is
    ``Dense``, that by sequence is ``Merge``.

    Raises:
        ValueError: in ``build``, if the output has another width than the input.
    """

    follows_base = True

    def build(self, num_experts: int, dim: int, out_dim: int | None = None) -> IA3Experts:
        if out_dim not in (None, dim):
            raise ValueError(f"out_dim={out_dim} is not dim={dim}: IA3() scales what it takes in")
        return IA3Experts(num_experts, dim)

    def num_params(self, dim: int, out_dim: int | None = None) -> int:
        return dim

    def flops_per_row(self, dim: int, out_dim: int | None = None) -> int:
        return 0
