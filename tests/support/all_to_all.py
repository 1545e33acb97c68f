"""Experts split over ranks: a dispatcher that sends rows to the experts' ranks, and the layers' experts as DTensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._functional_collectives import all_to_all_single_autograd
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from core import Experts, Routing, Rows, moe_layers
from core.dispatch import Dispatcher, LocalDispatcher


@dataclass(frozen=True)
class Journey:
    """The way of rows to other ranks, by which they come back.

    Attributes:
        rows: this rank's own tokens, as a ``LocalDispatcher`` sorts them.
        sent, received: number of rows for each rank, and from each.
        by_expert_R: int64 (R,), the received row that stands at each place.
    """

    rows: Rows
    sent: list[int]
    received: list[int]
    by_expert_R: Tensor


class AllToAllDispatcher(Dispatcher):
    """Rank r holds experts ``r * E / W`` to ``(r + 1) * E / W``; each rank routes tokens of its own.

    Args:
        group: the ranks; None: all. A copy of the dispatcher speaks in the default group.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group, self.local = group, LocalDispatcher()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "group": None}

    def dispatch(self, x: Tensor, routing: Routing) -> Rows:
        rows = self.local.dispatch(x, routing)
        live, world = int(rows.offsets_E[-1]), dist.get_world_size(self.group)
        sent_WE = routing.tokens_per_expert_E.view(world, -1)
        received_WE = torch.empty_like(sent_WE)
        dist.all_to_all_single(received_WE, sent_WE.contiguous(), group=self.group)
        # Rows come in by rank and then by expert, and are sorted by expert.
        expert_R = torch.arange(sent_WE.shape[1]).repeat(world).repeat_interleave(received_WE.flatten())
        journey = Journey(rows, sent_WE.sum(1).tolist(), received_WE.sum(1).tolist(), expert_R.argsort(stable=True))
        x_RD = self._exchange(rows.materialize()[:live], journey.sent, journey.received)
        gates_R = self._exchange(rows.gates_R[:live], journey.sent, journey.received)
        R = len(expert_R)
        return Rows(
            x=x_RD[journey.by_expert_R],
            row_index_R=torch.arange(R),
            offsets_E=received_WE.sum(0).cumsum(0).to(torch.int32),
            gates_R=gates_R[journey.by_expert_R],
            num_tokens=R,
            plan=journey,
            gathered=True,
        )

    def combine(self, rows: Rows) -> Tensor:
        journey = rows.plan
        y_RD = rows.x if rows.weighted else (rows.x * rows.gates_R[:, None]).to(rows.x.dtype)
        y_RD = torch.zeros_like(y_RD).index_copy(0, journey.by_expert_R, y_RD)
        y_RD = self._exchange(y_RD, journey.received, journey.sent)
        missing = len(journey.rows.row_index_R) - len(y_RD)
        y_RD = torch.cat((y_RD, y_RD.new_zeros(missing, y_RD.shape[1])))
        return self.local.combine(journey.rows.with_output(y_RD, weighted=True))

    def _exchange(self, rows_R: Tensor, sent: list[int], received: list[int]) -> Tensor:
        group = dist.group.WORLD if self.group is None else self.group
        exchanged: Tensor = all_to_all_single_autograd(rows_R.contiguous(), received, sent, group)
        return exchanged


def split_experts(model: nn.Module, mesh: DeviceMesh) -> None:
    """Give each layer of ``model`` an all-to-all, and keep this rank's routed experts alone."""
    for layer in moe_layers(model).values():
        layer.dispatcher = AllToAllDispatcher(mesh.get_group())
        for part in layer.experts.modules():
            if isinstance(part, Experts):
                for name, whole in list(part.named_parameters(recurse=False)):
                    local = whole.detach().chunk(mesh.size())[mesh.get_local_rank()]
                    setattr(part, name, nn.Parameter(DTensor.from_local(local.clone(), mesh, [Shard(0)])))
