"""Dispatchers move tokens to experts and back. Plain objects without parameters: swapping one touches nothing else."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from .contract import Routing, RowPlan, Rows
from .kernels import eager


class Dispatcher(Protocol):
    def dispatch(self, x: Tensor, routing: Routing) -> Rows:
        """(T, D) tokens to rows sorted by expert."""

    def combine(self, rows: Rows) -> Tensor:
        """The experts' output to (T, D_out): what is not weighted and summed yet is so here."""


class LocalDispatcher:
    """All experts are here: rows are an index into the tokens, and nothing is copied."""

    def dispatch(self, x: Tensor, routing: Routing) -> Rows:
        placed = eager.sort_pairs(routing.expert_ids_N, routing.tokens_per_expert_E)
        return Rows(
            x=x,
            row_index_R=routing.token_index_N.index_select(0, placed.order_R),
            offsets_E=placed.offsets_E,
            gates_R=routing.gates_N.index_select(0, placed.order_R),
            num_tokens=routing.num_tokens,
            plan=RowPlan(placed.order_R, placed.inverse_N, routing.top_k),
        )

    def combine(self, rows: Rows) -> Tensor:
        if rows.combined:
            return rows.x
        gates_R = None if rows.weighted else rows.gates_R
        return eager.combine(rows.x, rows.row_index_R, rows.offsets_E, gates_R, rows.num_tokens).to(rows.x.dtype)
