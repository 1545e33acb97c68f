"""The dispatcher of experts that are all on this device."""

from __future__ import annotations

from torch import Tensor

from .. import kernels
from ..contract import Routing, RowPlan, Rows


class LocalDispatcher:
    """All experts are here: rows are an index into the tokens, and nothing is copied.

    Args:
        backend: whose kernels sort the pairs and sum the rows.
    """

    def __init__(self, backend: str = "auto") -> None:
        self.backend = backend

    def dispatch(self, x: Tensor, routing: Routing) -> Rows:
        placed = kernels.sort_pairs(routing.expert_ids_N, routing.tokens_per_expert_E, backend=self.backend)
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
        y_TD = kernels.combine(
            rows.x,
            rows.row_index_R,
            rows.offsets_E,
            None if rows.weighted else rows.gates_R,
            rows.num_tokens,
            inverse_N=getattr(rows.plan, "inverse_N", None),
            top_k=getattr(rows.plan, "top_k", None),
            backend=self.backend,
        )
        return y_TD.to(rows.x.dtype)
