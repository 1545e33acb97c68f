"""The dispatcher of experts that are all on this device."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import kernels
from ..contract import Routing, RowPlan, Rows, span
from .base import Dispatcher


class LocalDispatcher(Dispatcher):
    """All experts are here: rows are an index into the tokens, and nothing is copied.

    If the routing says that its pairs read other rows than they are summed to (``Routing.input_index_N``), the rows
    are copies. On a CPU pairs that no expert computes are then left out. On other devices, and in compiled code, the
    number of rows is static.
    """

    @span("moe.dispatch")
    def dispatch(self, x: Tensor, routing: Routing) -> Rows:
        placed = kernels.sort_pairs(routing.expert_ids_N, routing.tokens_per_expert_E, backend=self.backend)
        order_R, input_index_N = placed.order_R, routing.input_index_N
        if input_index_N is not None:
            if x.device.type == "cpu" and not torch.compiler.is_compiling():
                order_R = order_R[: int(placed.offsets_E[-1])]
            x = x.index_select(0, input_index_N.index_select(0, order_R))
        return Rows(
            x=x,
            row_index_R=routing.token_index_N.index_select(0, order_R),
            offsets_E=placed.offsets_E,
            gates_R=routing.gates_N.index_select(0, order_R),
            num_tokens=routing.num_tokens,
            plan=RowPlan(order_R, placed.inverse_N, routing.top_k),
            gathered=input_index_N is not None,
        )

    @span("moe.combine")
    def combine(self, rows: Rows) -> Tensor:
        if rows.combined:
            return rows.x
        inverse_N, top_k = getattr(rows.plan, "inverse_N", None), getattr(rows.plan, "top_k", None)
        index = kernels.RowIndex(rows.row_index_R, rows.offsets_E, inverse_N, top_k)
        gates_R = None if rows.weighted else rows.gates_R
        return kernels.combine(rows.x, index, gates_R, rows.num_tokens, backend=self.backend).to(rows.x.dtype)
