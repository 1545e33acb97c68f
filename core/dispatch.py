"""Dispatchers move tokens to experts and back. Plain objects without parameters: swapping one touches nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from . import kernels
from .contract import Routing, RowPlan, Rows, SlotPlan, SlotRouting


class Dispatcher(Protocol):
    def dispatch(self, x: Tensor, routing: Any) -> Rows:
        """(T, D) tokens to rows sorted by expert. ``routing`` is what the layer's router decides."""

    def combine(self, rows: Rows) -> Tensor:
        """The experts' output to (T, D_out): what is not weighted and summed yet is so here."""


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


class SlotDispatcher:
    """Soft slots: the rows of an expert are its slots of all groups, G * P of them, each a mean over its group.

    Tokens come and go by group, (G, S, D). Sums over tokens and slots run in their dtype (autocast's, where it is on).
    """

    def dispatch(self, x: Tensor, routing: SlotRouting) -> Rows:
        dispatch_GSEP = routing.dispatch_GSEP
        G, S, E, P = dispatch_GSEP.shape
        if routing.valid_T is not None:
            # Padding has share 0 but may hold NaN.
            x = x.masked_fill(~routing.valid_T.unflatten(0, (G, S))[:, :, None], 0.0)
        slots_EGPD = torch.einsum("gsep,gsd->egpd", dispatch_GSEP.to(x.dtype), x)
        R, device = E * G * P, x.device
        return Rows(
            x=slots_EGPD.reshape(R, x.shape[-1]),
            row_index_R=torch.arange(R, device=device),
            offsets_E=torch.arange(1, E + 1, dtype=torch.int32, device=device) * (G * P),
            # The experts weight each row by its gate: here the combine weights do.
            gates_R=torch.ones(R, dtype=dispatch_GSEP.dtype, device=device),
            num_tokens=routing.num_tokens,
            plan=SlotPlan(routing.combine_GSEP),
            gathered=True,
        )

    def combine(self, rows: Rows) -> Tensor:
        combine_GSEP = rows.plan.combine_GSEP
        G, _, E, P = combine_GSEP.shape
        y_EGPD = rows.x.reshape(E, G, P, rows.x.shape[-1])
        return torch.einsum("gsep,egpd->gsd", combine_GSEP.to(rows.x.dtype), y_EGPD)
