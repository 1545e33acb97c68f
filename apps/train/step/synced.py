"""The base of metrics that keep the values of every example, with equal results on one process and on many."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics import Metric


def _gather(tensor: Tensor, group: Any = None) -> list[Tensor]:
    """Return the tensor of each rank, on this one's device; their first sizes may differ.

    torchmetrics' own function then indexes by a list of slices, whose meaning torch is going to change.
    """
    parts = [tensor] * dist.get_world_size(group)
    dist.all_gather_object(parts, tensor.cpu(), group)
    return [part.to(tensor.device) for part in parts]


class SyncedMetric(Metric):
    """A metric whose states are gathered also if a rank had no batch, and if they are on the CPU under NCCL."""

    full_state_update = False
    is_differentiable = False

    def __init__(self) -> None:
        super().__init__(dist_sync_fn=_gather)

    def _empty(self) -> Mapping[str, Tensor]:
        """Return an empty tensor for each list state, by name: all ranks must take part in a gather."""
        return {}

    def _sync_dist(self, dist_sync_fn: Any = _gather, process_group: Any = None) -> None:
        for name, empty in self._empty().items():
            if not getattr(self, name):
                setattr(self, name, [empty])
        super()._sync_dist(dist_sync_fn, process_group)


def joined(state: Any, empty: Tensor) -> Tensor:
    """Return a list state as one tensor, before a gather and after it; ``empty`` if nothing was added."""
    if isinstance(state, Tensor):  # after a gather
        return state
    return torch.cat(state) if state else empty
