"""Rows of several tasks that share the experts of a multi-gate layer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import kernels
from ..contract import Routing, RowPlan, Rows
from .local import LocalDispatcher


def join_tasks(routings: Sequence[Routing]) -> Routing:
    """The routings of t tasks for the same T tokens as one of t * T *virtual tokens*: number ``k * T + i`` is token i
    as task k sees it. For ``TaskDispatcher``; what losses and statistics read stays with the tasks' own."""
    T, first = routings[0].num_tokens, routings[0]
    same = all(r.top_k == first.top_k for r in routings)
    return Routing(
        token_index_N=torch.cat([r.token_index_N + k * T for k, r in enumerate(routings)]),
        expert_ids_N=torch.cat([r.expert_ids_N for r in routings]),
        gates_N=torch.cat([r.gates_N for r in routings]),
        tokens_per_expert_E=sum((r.tokens_per_expert_E for r in routings[1:]), first.tokens_per_expert_E),
        chosen_per_expert_E=sum((r.chosen_per_expert_E for r in routings[1:]), first.chosen_per_expert_E),
        num_tokens=len(routings) * T,
        top_k=first.top_k if same else None,
    )


class TaskDispatcher(LocalDispatcher):
    """Rows of ``join_tasks``: each is a copy of its token, and the outputs are summed by virtual token.

    The tokens themselves are not copied t times, and what no expert computes is not gathered (on CPU; elsewhere, and in
    compiled code, the number of rows is static).
    """

    def dispatch(self, x: Tensor, routing: Routing) -> Rows:
        """(T, D) tokens and a routing of t * T virtual ones, whose number ``combine`` returns."""
        placed = kernels.sort_pairs(routing.expert_ids_N, routing.tokens_per_expert_E, backend=self.backend)
        order_R = placed.order_R
        if x.device.type == "cpu" and not torch.compiler.is_compiling():
            order_R = order_R[: int(placed.offsets_E[-1])]
        virtual_R = routing.token_index_N.index_select(0, order_R)
        return Rows(
            x=x.index_select(0, virtual_R % max(x.shape[0], 1)),
            row_index_R=virtual_R,
            offsets_E=placed.offsets_E,
            gates_R=routing.gates_N.index_select(0, order_R),
            num_tokens=routing.num_tokens,
            plan=RowPlan(order_R, placed.inverse_N, routing.top_k),
            gathered=True,
        )
