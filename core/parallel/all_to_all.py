"""The dispatcher of experts that are split over ranks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ..contract import Routing, RowPlan, Rows, span
from ..dispatch import Dispatcher, LocalDispatcher
from ..kernels import expert_of_rows
from .routes import Hop, Routes


@dataclass(frozen=True)
class Way:
    """The way of rows to other ranks, by which they come back.

    Attributes:
        rows: this rank's own tokens, sorted by the experts of all ranks.
        place_R: int64 (R,), the place of each of those rows among the sent ones; behind the last one: it is not sent.
        hops: the all-to-alls on the way.
    """

    rows: Rows
    place_R: Tensor
    hops: list[Hop]


@dataclass(frozen=True)
class Journey(RowPlan):
    """The way from the experts' sorted rows back to the received ones, and from there to the tokens' ranks."""

    way: Way


class AllToAllDispatcher(Dispatcher):
    """Sends rows to the ranks that hold their experts, and the experts' output back (arXiv 2006.16668).

    Part r of P of the ranks holds experts ``r E / P`` to ``(r + 1) E / P``, and each rank routes tokens of its own.
    Rows are received by rank and then by expert; the experts read them through an index, as they read tokens, so that
    the received rows are moved no second time. Each rank weights its outputs, and the rank of a token sums. While rows
    travel, the layer's shared experts compute.

    All ranks of the mesh call a layer together. A copy of the dispatcher has no ranks, and raises an error on dispatch.

    Args:
        mesh: the ranks, as in ``shard_experts``.
        static: whether each expert is sent as many rows as it can ever get, empty ones too, by a capacity that the
            routing knows (``Routing.most_per_expert``). The host then waits for no device, and shapes are static; all
            ranks need as many tokens. Else the ranks first tell each other their numbers of rows, for which the host
            waits once, and may have any number of tokens, also none.

    Raises:
        ValueError: in ``dispatch``, ``static`` without a capacity, or the dispatcher is a copy.
    """

    travels = True

    def __init__(self, mesh: DeviceMesh, static: bool = False) -> None:
        self.static, self._local = static, LocalDispatcher()
        self._routes: Routes | None = Routes(mesh)

    @property
    def group(self) -> dist.ProcessGroup | None:
        """The ranks that share the experts; None for a copy."""
        return None if self._routes is None else self._routes.group

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_routes": None}

    @span("moe.dispatch")
    def dispatch(self, x: Tensor, routing: Routing) -> Rows:
        if self._routes is None:
            raise ValueError("the dispatcher is a copy, which knows no ranks: call core.parallel.shard_experts again")
        self._local.backend = self.backend
        rows = self._local.dispatch(x, routing)
        return self._static(rows, routing, self._routes) if self.static else self._counted(rows, routing, self._routes)

    def _counted(self, rows: Rows, routing: Routing, routes: Routes) -> Rows:
        """Dispatch as many rows as there are."""
        received_WE, hops = routes.counted(routing.tokens_per_expert_E)
        live, device = hops[0].num_rows, rows.x.device
        x_RD, gates_R = (_there(t, hops) for t in (rows.materialize()[:live], rows.gates_R[:live]))
        W, local = received_WE.shape
        expert_R = torch.arange(local, device=device).repeat(W)
        expert_R = expert_R.repeat_interleave(received_WE.flatten(), output_size=gates_R.shape[0])
        place_R = torch.arange(rows.row_index_R.shape[0], device=device).clamp_max(live)
        return self._received(x_RD, gates_R, expert_R, received_WE.sum(0), Way(rows, place_R, hops))

    def _static(self, rows: Rows, routing: Routing, routes: Routes) -> Rows:
        """Dispatch with ``most_per_expert`` places for each expert, filled from the first one on."""
        C, E = routing.most_per_expert, rows.offsets_E.shape[0]
        if C is None:
            raise ValueError("static=True needs a capacity: give the layer a capacity_factor, or leave static out")
        R, device = rows.row_index_R.shape[0], rows.x.device
        row_R = torch.arange(R, device=device)
        expert_R = expert_of_rows(rows.gates_R, rows.offsets_E)
        start_E = rows.offsets_E.to(torch.int64) - routing.tokens_per_expert_E
        place_R = expert_R * C + row_R - start_E.index_select(0, expert_R.clamp_max(E - 1))
        place_R = torch.where(row_R < rows.offsets_E[-1], place_R, E * C)
        row_S = torch.full((E * C + 1,), R, device=device).scatter(0, place_R, row_R)[:-1]
        hops = routes.static(E * C, device)
        x_SD, gates_S = (_there(_with_zero(t).index_select(0, row_S), hops) for t in (rows.materialize(), rows.gates_R))
        local = E // routes.num_parts
        W = gates_S.shape[0] // max(local * C, 1)
        expert_S = torch.arange(local, device=device).repeat_interleave(C).repeat(W)
        count_E = torch.full((local,), W * C, device=device)
        return self._received(x_SD, gates_S, expert_S, count_E, Way(rows, place_R, hops))

    def _received(self, x_RD: Tensor, gates_R: Tensor, expert_R: Tensor, count_E: Tensor, way: Way) -> Rows:
        """Return the experts' rows, given the received rows: tokens of one pair each."""
        R = expert_R.shape[0]
        pairs = Routing(
            token_index_N=torch.arange(R, device=expert_R.device),
            expert_ids_N=expert_R,
            gates_N=gates_R,
            tokens_per_expert_E=count_E,
            chosen_per_expert_E=count_E,
            num_tokens=R,
            top_k=1,
        )
        own = self._local.dispatch(x_RD, pairs)
        plan = Journey(own.plan.order_R, own.plan.inverse_N, 1, way)
        return replace(own, plan=plan)

    @span("moe.combine")
    def combine(self, rows: Rows) -> Tensor:
        way: Way = rows.plan.way
        y_RD = self._local.combine(rows)
        for hop in reversed(way.hops):
            y_RD = hop.back(y_RD)
        y_RD = _with_zero(y_RD).index_select(0, way.place_R)
        return self._local.combine(way.rows.with_output(y_RD, weighted=True))


def _there(rows_R: Tensor, hops: list[Hop]) -> Tensor:
    for hop in hops:
        rows_R = hop.there(rows_R)
    return rows_R


def _with_zero(rows_R: Tensor) -> Tensor:
    """Return rows with a zero one behind them."""
    return torch.cat((rows_R, rows_R.new_zeros(1, *rows_R.shape[1:])))
