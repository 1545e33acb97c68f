"""The dispatcher of experts that are split over ranks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import all_to_all_single_autograd

from ..contract import Routing, RowPlan, Rows
from ..dispatch import Dispatcher, LocalDispatcher
from ..kernels import expert_of_rows


@dataclass(frozen=True)
class Journey(RowPlan):
    """The way of rows to other ranks, by which they come back. The base class has the way from the sorted rows to the
    received ones.

    Attributes:
        rows: this rank's own tokens, sorted by the experts of all ranks.
        place_R: int64 (R,), the place of each of those rows among the sent ones.
        sent, received: number of rows for each rank, and from each; None: as many for each.
    """

    rows: Rows
    place_R: Tensor
    sent: list[int] | None
    received: list[int] | None


class AllToAllDispatcher(Dispatcher):
    """Sends rows to the ranks that hold their experts, and the experts' output back (arXiv 2006.16668).

    Rank r of the W in the group holds experts ``r E / W`` to ``(r + 1) E / W``, and routes tokens of its own. Rows are
    received by rank and then by expert; the experts read them through an index, as they read tokens, so that the
    received rows are moved no second time. Each rank weights what it computes, and the rank of a token sums. While rows
    travel, the layer's shared experts compute.

    All ranks of the group call a layer together.

    Args:
        group: the ranks; None: all. A copy of the dispatcher speaks in the default group.
        static: whether each expert is sent as many rows as it can ever get, empty ones too, by a capacity that the
            routing knows (``Routing.most_per_expert``). The host then waits for no device, and shapes are static; all
            ranks need as many tokens. Else the ranks exchange their numbers of rows first, for which the host waits
            once, and may have any number of tokens, also none.

    Raises:
        ValueError: in ``dispatch``, ``static`` without a capacity.
    """

    travels = True

    def __init__(self, group: dist.ProcessGroup | None = None, static: bool = False) -> None:
        self.group, self.static, self._local = group, static, LocalDispatcher()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "group": None}

    def dispatch(self, x: Tensor, routing: Routing) -> Rows:
        self._local.backend = self.backend
        rows = self._local.dispatch(x, routing)
        if self.static:
            return self._dispatch_static(rows, routing)
        sent_WE = self._by_rank(routing.tokens_per_expert_E)
        received_WE = torch.empty_like(sent_WE)
        dist.all_to_all_single(received_WE, sent_WE, group=self.group)
        sent, received = torch.stack((sent_WE.sum(1), received_WE.sum(1))).tolist()
        live = sum(sent)
        x_RD = self._exchange(rows.materialize()[:live], sent, received)
        gates_R = self._exchange(rows.gates_R[:live], sent, received)
        W, local = received_WE.shape
        expert_R = torch.arange(local, device=x.device).repeat(W)
        expert_R = expert_R.repeat_interleave(received_WE.flatten(), output_size=sum(received))
        # Rows that no expert computes have no place among the sent ones: they read the zero behind those.
        place_R = torch.arange(rows.row_index_R.shape[0], device=x.device).clamp_max(live)
        return self._received(x_RD, gates_R, expert_R, received_WE.sum(0), (rows, place_R, sent, received))

    def _dispatch_static(self, rows: Rows, routing: Routing) -> Rows:
        """Dispatch with ``most_per_expert`` places for each expert, filled from the first one on."""
        C, E = routing.most_per_expert, rows.offsets_E.shape[0]
        if C is None:
            raise ValueError(
                "static=True needs a capacity: give the layer a capacity_factor, or its dispatcher no static"
            )
        R, device = rows.row_index_R.shape[0], rows.x.device
        expert_R = expert_of_rows(rows.gates_R, rows.offsets_E)
        start_E = rows.offsets_E.to(torch.int64) - routing.tokens_per_expert_E
        place_R = expert_R * C + torch.arange(R, device=device) - start_E.index_select(0, expert_R.clamp_max(E - 1))
        place_R = torch.where(torch.arange(R, device=device) < rows.offsets_E[-1], place_R, E * C)
        row_P = torch.full((E * C + 1,), R, device=device).scatter(0, place_R, torch.arange(R, device=device))[:-1]
        x_PD = self._exchange(_with_zero(rows.materialize()).index_select(0, row_P), None, None)
        gates_P = self._exchange(_with_zero(rows.gates_R).index_select(0, row_P), None, None)
        W = dist.get_world_size(self.group)
        expert_P = torch.arange(E // W, device=device).repeat_interleave(C).repeat(W)
        count_E = torch.full((E // W,), W * C, device=device)
        return self._received(x_PD, gates_P, expert_P, count_E, (rows, place_R, None, None))

    def _received(self, x_RD: Tensor, gates_R: Tensor, expert_R: Tensor, count_E: Tensor, way: tuple[Any, ...]) -> Rows:
        """Return the experts' rows, given what has come in, tokens of one pair each, and the fields of ``Journey``."""
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
        return replace(own, plan=Journey(own.plan.order_R, own.plan.inverse_N, 1, *way))

    def combine(self, rows: Rows) -> Tensor:
        journey: Journey = rows.plan
        y_RD = self._exchange(self._local.combine(rows), journey.received, journey.sent)
        y_RD = _with_zero(y_RD).index_select(0, journey.place_R)
        return self._local.combine(journey.rows.with_output(y_RD, weighted=True))

    def _by_rank(self, count_E: Tensor) -> Tensor:
        """Return the counts of each rank's experts, (W, E / W)."""
        return count_E.view(dist.get_world_size(self.group), -1).contiguous()

    def _exchange(self, rows_R: Tensor, sent: list[int] | None, received: list[int] | None) -> Tensor:
        group = self.group or dist.distributed_c10d._get_default_group()
        exchanged: Tensor = all_to_all_single_autograd(rows_R.contiguous(), received, sent, group)
        return exchanged


def _with_zero(rows_R: Tensor) -> Tensor:
    """Return rows with a zero one behind them."""
    return torch.cat((rows_R, rows_R.new_zeros(1, *rows_R.shape[1:])))
