"""The dispatcher of experts that are split over ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed._functional_collectives import all_to_all_single_autograd

from ..contract import Routing, RowPlan, Rows
from ..dispatch import Dispatcher, LocalDispatcher


@dataclass(frozen=True)
class Journey(RowPlan):
    """The way of rows to other ranks, by which they come back. The base class has the way from the sorted rows to the
    received ones.

    Attributes:
        rows: this rank's own tokens, sorted by the experts of all ranks.
        sent, received: number of rows for each rank, and from each.
    """

    rows: Rows
    sent: Sequence[int]
    received: Sequence[int]


class AllToAllDispatcher(Dispatcher):
    """Sends rows to the ranks that hold their experts, and the experts' output back (arXiv 2006.16668).

    Rank r of the W in the group holds experts ``r E / W`` to ``(r + 1) E / W``, and routes tokens of its own. Rows are
    received by rank and then by expert; the experts read them through an index, as they read tokens, so that the
    received rows are moved no second time. Each rank weights what it computes, and the rank of a token sums.

    All ranks of the group call a layer together, with any number of tokens, also none. The numbers of rows are
    exchanged first, for which the host waits once.

    Args:
        group: the ranks; None: all. A copy of the dispatcher speaks in the default group.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group, self._local = group, LocalDispatcher()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "group": None}

    def dispatch(self, x: Tensor, routing: Routing) -> Rows:
        self._local.backend = self.backend
        rows = self._local.dispatch(x, routing)
        sent_WE, received_WE = self._counts(routing.tokens_per_expert_E)
        sent, received = torch.stack((sent_WE.sum(1), received_WE.sum(1))).tolist()
        live = sum(sent)
        x_RD = self._exchange(rows.materialize()[:live], sent, received)
        gates_R = self._exchange(rows.gates_R[:live], sent, received)
        W, local = received_WE.shape
        expert_R = torch.arange(local, device=x.device).repeat(W)
        expert_R = expert_R.repeat_interleave(received_WE.flatten(), output_size=sum(received))
        count_E = received_WE.sum(0)
        # Received rows are tokens of one pair each.
        pairs = Routing(
            token_index_N=torch.arange(sum(received), device=x.device),
            expert_ids_N=expert_R,
            gates_N=gates_R,
            tokens_per_expert_E=count_E,
            chosen_per_expert_E=count_E,
            num_tokens=sum(received),
            top_k=1,
        )
        own = self._local.dispatch(x_RD, pairs)
        plan = Journey(own.plan.order_R, own.plan.inverse_N, 1, rows, sent, received)
        return Rows(x_RD, own.row_index_R, own.offsets_E, own.gates_R, own.num_tokens, plan)

    def combine(self, rows: Rows) -> Tensor:
        journey: Journey = rows.plan
        y_RD = self._exchange(self._local.combine(rows), journey.received, journey.sent)
        missing = journey.rows.row_index_R.shape[0] - y_RD.shape[0]
        if missing:  # pairs that no expert computes
            y_RD = torch.cat((y_RD, y_RD.new_zeros(missing, y_RD.shape[1])))
        return self._local.combine(journey.rows.with_output(y_RD, weighted=True))

    def _counts(self, count_E: Tensor) -> tuple[Tensor, Tensor]:
        """Return how many rows this rank sends to each rank's experts, and receives from each, int64 (W, E / W)."""
        sent_WE = count_E.view(dist.get_world_size(self.group), -1).contiguous()
        received_WE = torch.empty_like(sent_WE)
        dist.all_to_all_single(received_WE, sent_WE, group=self.group)
        return sent_WE, received_WE

    def _exchange(self, rows_R: Tensor, sent: Sequence[int], received: Sequence[int]) -> Tensor:
        group = self.group or dist.distributed_c10d._get_default_group()
        exchanged: Tensor = all_to_all_single_autograd(rows_R.contiguous(), list(received), list(sent), group)
        return exchanged
