"""Experts of one neuron each, in tables (PEER, arXiv 2407.04153)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn

from ..contract import Rows
from ..fields import OneOf
from ..kernels import ACTIVATIONS, expert_of_rows, neurons
from .base import ExpertConfig, Experts, local_tensor


class NeuronExperts(Experts):
    """E experts ``f_e(x) = act(x . u_e) v_e``, a million of them or more.

    Parameters: ``u`` (E, D) and ``v`` (E, D_out). ``NeuronMoE`` asks them in a way of their own,
    ``experts(x_TD, "picked", ids_TK, gates_TK)``, which sorts no pairs and saves no picked row for the backward.
    """

    shown = ("activation", "row_sparse")

    def __init__(self, num_experts: int, dim: int, out_dim: int, *, activation: str, row_sparse: bool) -> None:
        super().__init__()
        self.num_experts, self.activation, self.row_sparse = num_experts, activation, row_sparse
        self.u = nn.Parameter(torch.empty(num_experts, dim))
        self.v = nn.Parameter(torch.empty(num_experts, out_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start ``u`` and ``v`` as ``U(-1/sqrt(width), 1/sqrt(width))``, each by its own width."""
        for table in (self.u, self.v):
            bound = table.shape[1] ** -0.5
            nn.init.uniform_(table, -bound, bound)

    def init_each(self, fn: Callable[[Tensor], Any]) -> None:
        """Start every local expert by ``fn``, which gets ``u_e`` as (D, 1) and ``v_e`` as (1, D_out)."""
        with torch.no_grad():
            for u_D in local_tensor(self.u):
                fn(u_D[:, None])
            for v_D in local_tensor(self.v):
                fn(v_D[None])

    def compute_picked(self, x: Tensor, ids_TK: Tensor, gates_TK: Tensor) -> Tensor:
        """Return the sum over the experts that each token picked, times their gates: (T, D) to (T, D_out).

        Args:
            x: (T, D); a token that picks no expert may hold anything.
            ids_TK: int64 (T, K), experts of each token, one of them twice if need be; E if nothing is computed.
            gates_TK: float32 (T, K).
        """
        return neurons(
            x,
            local_tensor(self.u),
            local_tensor(self.v),
            ids_TK,
            gates_TK,
            self.activation,
            row_sparse=self.row_sparse,
            backend=self.backend,
        )

    def compute_rows(self, rows: Rows) -> Rows:
        """Return the rows computed, each a token that picks one expert."""
        expert_R = expert_of_rows(rows.x, rows.offsets_E)
        if rows.x.device.type == "cpu" and not torch.compiler.is_compiling() and type(rows.x) is Tensor:
            live = int(rows.offsets_E[-1])  # the rows past the last offset are not computed
            y_RD = self.compute_picked(rows.x[:live], expert_R[:live, None], rows.gates_R[:live, None])
            y_RD = torch.cat((y_RD, y_RD.new_zeros(rows.x.shape[0] - live, y_RD.shape[1])))
        else:
            y_RD = self.compute_picked(rows.x, expert_R[:, None], rows.gates_R[:, None])
        return rows.with_output(y_RD, weighted=True)


@dataclass(frozen=True)
class PEER(ExpertConfig):
    """``f_e(x) = act(x . u_e) v_e``, an expert of one neuron (PEER, arXiv 2407.04153). ``ProductKeys`` chooses among a
    million of them; any other router that chooses pairs does too, if E is small.

    Attributes:
        activation: "relu", "gelu" or "silu".
        row_sparse: the gradients of the two tables are sparse tensors of the rows that were picked, for
            ``core.RowAdam`` or ``torch.optim.SparseAdam``. Compiled code makes dense ones nevertheless. False: dense
            gradients, which any optimizer takes.

    Raises:
        ValueError: the activation is unknown.

    Example::

        MoEConfig(1024**2, ProductKeys(top_k=16, heads=8), PEER(row_sparse=True)).build(128)
    """

    layer_kind: ClassVar[str] = "neurons"

    activation: Annotated[str, OneOf(*ACTIVATIONS)] = "gelu"
    row_sparse: bool = False

    def build(self, num_experts: int, dim: int, out_dim: int | None = None) -> NeuronExperts:
        width = dim if out_dim is None else out_dim
        return NeuronExperts(num_experts, dim, width, activation=self.activation, row_sparse=self.row_sparse)

    def num_params(self, dim: int, out_dim: int | None = None) -> int:
        return dim + (dim if out_dim is None else out_dim)
