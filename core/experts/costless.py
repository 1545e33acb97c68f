"""Experts that cost next to nothing: zero, copy and a learned constant (MoE++, arXiv 2410.07348).

A token that takes one of them has less of the others computed. They are used next to real experts in ``Mixed``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..contract import Rows
from ..kernels import expert_linear, expert_of_rows
from .base import ExpertConfig, Experts, local_tensor
from .products import autocast_together


class ZeroExperts(Experts):
    """E experts whose output is zero."""

    shown = ("out_dim",)
    takes_index = True

    def __init__(self, num_experts: int, out_dim: int) -> None:
        super().__init__()
        self.num_experts, self.out_dim = num_experts, out_dim

    def compute_rows(self, rows: Rows) -> Rows:
        length = rows.x.shape[0] if rows.gathered else rows.num_tokens
        y = rows.x.new_zeros(length, self.out_dim) + _linked_zero(rows)
        return rows.with_output(y, weighted=True, combined=not rows.gathered)


@dataclass(frozen=True)
class Zero(ExpertConfig):
    """``f(x) = 0``: the token is discarded, and the block's residual carries it (MoE++, arXiv 2410.07348, eq. 3)."""

    def build(self, num_experts: int, dim: int, out_dim: int | None = None) -> ZeroExperts:
        return ZeroExperts(num_experts, dim if out_dim is None else out_dim)

    def num_params(self, dim: int, out_dim: int | None = None) -> int:
        return 0


class IdentityExperts(Experts):
    """E experts whose output is their input. No row is copied: a token is scaled by the sum of its gates."""

    takes_index = True

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts

    def compute_rows(self, rows: Rows) -> Rows:
        if rows.gathered:
            return rows.with_output(rows.x)
        live_R = torch.arange(rows.gates_R.shape[0], device=rows.x.device) < rows.offsets_E[-1]
        gates_R = torch.where(live_R, rows.gates_R, 0)
        gate_T = gates_R.new_zeros(rows.num_tokens).index_add(0, rows.row_index_R, gates_R)
        # Padding may hold NaN, and takes no expert.
        y_TD = torch.where((gate_T != 0)[:, None], rows.x * gate_T[:, None], 0)
        return rows.with_output(y_TD.to(rows.x.dtype), combined=True)


@dataclass(frozen=True)
class Identity(ExpertConfig):
    """``f(x) = x``: the token skips the layer (MoE++, arXiv 2410.07348, eq. 4; the identity experts of LongCat-Flash,
    arXiv 2509.01322).

    Raises:
        ValueError: in ``build``, if the output has another width than the input.
    """

    def build(self, num_experts: int, dim: int, out_dim: int | None = None) -> IdentityExperts:
        _check_same_width("Identity()", dim, out_dim)
        return IdentityExperts(num_experts)

    def num_params(self, dim: int, out_dim: int | None = None) -> int:
        return 0


class ConstantExperts(Experts):
    """E experts whose output is a learned vector, or a learned mixture of the token and the vector.

    Parameters: ``v`` (E, D_out), zero at the start; ``w_mix`` (E, D, 2) if mixed.
    """

    takes_index = True

    def __init__(self, num_experts: int, dim: int, out_dim: int, mix: bool) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.v = nn.Parameter(torch.empty(num_experts, out_dim))
        self.w_mix = nn.Parameter(torch.empty(num_experts, dim, 2)) if mix else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start at ``v = 0``, and where mixed at equal parts."""
        for parameter in (self.v, self.w_mix):
            if parameter is not None:
                nn.init.zeros_(parameter)

    def biases(self) -> list[Tensor]:
        return [self.v]

    def no_weight_decay(self) -> set[str]:
        """Return the vectors, which are biases."""
        return {"v"}

    def compute_rows(self, rows: Rows) -> Rows:
        expert_R = expert_of_rows(rows.gates_R, rows.offsets_E)
        live_R1 = (expert_R < rows.offsets_E.shape[0])[:, None]
        v = local_tensor(self.v)
        y_RD = v.index_select(0, expert_R.clamp_max(v.shape[0] - 1))
        if self.w_mix is None:
            return rows.with_output(torch.where(live_R1, y_RD, 0).to(rows.x.dtype) + _linked_zero(rows))
        x_RD = rows.materialize()
        x, w_mix = autocast_together(x_RD, self.w_mix)
        share_R2 = expert_linear(x, w_mix, rows.offsets_E, backend=self.backend).softmax(-1)
        y_RD = share_R2[:, :1] * x_RD + share_R2[:, 1:] * y_RD
        return rows.with_output(torch.where(live_R1, y_RD, 0).to(x_RD.dtype))


@dataclass(frozen=True)
class Constant(ExpertConfig):
    """``f(x) = v``, a learned vector (MoNE, arXiv 2507.00390), or with ``mix`` the expert of MoE++ (arXiv 2410.07348,
    eq. 5): ``f(x) = a_1 x + a_2 v`` with ``(a_1, a_2) = softmax(x w_mix)``.

    Attributes:
        mix: whether the token is mixed in, by ``2 D`` more parameters and one small matmul per row.

    Raises:
        ValueError: in ``build``, if a mixed output has another width than the input.
    """

    mix: bool = False

    def build(self, num_experts: int, dim: int, out_dim: int | None = None) -> ConstantExperts:
        if self.mix:
            _check_same_width("Constant(mix=True)", dim, out_dim)
        return ConstantExperts(num_experts, dim, dim if out_dim is None else out_dim, self.mix)

    def num_params(self, dim: int, out_dim: int | None = None) -> int:
        return (dim if out_dim is None else out_dim) + (2 * dim if self.mix else 0)

    def flops_per_row(self, dim: int, out_dim: int | None = None) -> int:
        return 4 * dim if self.mix else 0


def _linked_zero(rows: Rows) -> Tensor:
    """Return 0, (), as a function of tokens and gates: a backward reaches both, with gradients of 0."""
    return (rows.x[:0].sum() + rows.gates_R[:0].sum()).to(rows.x.dtype)


def _check_same_width(expert: str, dim: int, out_dim: int | None) -> None:
    if out_dim not in (None, dim):
        raise ValueError(f"out_dim={out_dim} is not dim={dim}: {expert} puts out what it takes in")
