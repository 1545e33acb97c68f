"""The ways that rows take between ranks: from each to each, by way of a neighbor, or to several at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ..torch_internals import all_to_all, one_axis
from .mesh import hidden_ranks


@dataclass(frozen=True)
class Hop:
    """One all-to-all of rows among the ranks of a group.

    Attributes:
        group: the ranks.
        index_S: int64 (S,), the row at each place of the sent buffer; None: all rows in their order. A row may be sent
            several times.
        num_rows: R, rows before the hop.
        sent, received: number of rows for each rank, and from each; None: as many for each.
    """

    group: dist.ProcessGroup
    index_S: Tensor | None
    num_rows: int
    sent: list[int] | None
    received: list[int] | None

    def there(self, x_R: Tensor) -> Tensor:
        """Return the rows that this rank receives, given (R, ...) rows."""
        x_S = x_R if self.index_S is None else x_R.index_select(0, self.index_S)
        return self._exchange(x_S, self.sent, self.received)

    def back(self, y: Tensor) -> Tensor:
        """Return (R, ...), the sums of the outputs that come back for each row, given as many rows as were received."""
        y_S = self._exchange(y, self.received, self.sent)
        if self.index_S is None:
            return y_S
        return y_S.new_zeros(self.num_rows, *y_S.shape[1:]).index_add(0, self.index_S, y_S)

    def _exchange(self, rows: Tensor, sent: list[int] | None, received: list[int] | None) -> Tensor:
        return all_to_all(rows.contiguous(), received, sent, self.group)


class Routes:
    """The ways of rows between the ranks that share out the experts of a layer.

    Args:
        mesh: axes "node", "expert" and "hidden", each of which may be missing, or one axis of any name. With nodes a
            row goes to the neighbor that has the place of its goal among the ranks of its node, and from there to the
            goal: fewer and larger messages between nodes (arXiv 2206.03382, section 4.2). With sharded hidden units, a
                row goes to all ranks that have a part of its expert, whose outputs are added.
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        names = mesh.mesh_dim_names or ()
        self.copies = hidden_ranks(mesh)
        self.group = mesh.get_group() if mesh.ndim == 1 else one_axis(mesh).get_group()
        self.levels: tuple[dist.ProcessGroup, dist.ProcessGroup] | None = None
        if "node" in names:
            inner = tuple(name for name in names if name != "node")
            within = mesh[inner] if len(inner) == 1 else one_axis(mesh[inner])
            self.levels = (mesh["node"].get_group(), within.get_group())

    @property
    def num_parts(self) -> int:
        """The number of shards of the experts."""
        return dist.get_world_size(self.group) // self.copies

    def counted(self, count_E: Tensor) -> tuple[Tensor, list[Hop]]:
        """Send and receive the numbers of rows, for which the host waits once.

        Args:
            count_E: int64 (E,), rows of this rank for each expert; rows are sorted by expert.

        Returns:
            The rows that come in from each rank for each expert here, int64 (W, e), in the order in which they come,
            and the hops.
        """
        part_PE = count_E.view(self.num_parts, -1)
        sent_WE = part_PE.repeat_interleave(self.copies, 0).contiguous()
        if self.levels is None:
            received_WE = _exchanged(sent_WE, self.group)
            sent, received, parts = _numbers(sent_WE.sum(1), received_WE.sum(1), part_PE.sum(1))
            return received_WE, [Hop(self.group, self._to_copies(parts, count_E.device), sum(parts), sent, received)]
        outer, inner = self.levels
        N, M = dist.get_world_size(outer), dist.get_world_size(inner)
        by_way_MNE = _exchanged(sent_WE.unflatten(0, (N, M)).transpose(0, 1).contiguous(), inner)
        received_NME = _exchanged(by_way_MNE.transpose(0, 1).contiguous(), outer)
        all_parts = (part_PE.sum(1), sent_WE.sum(1), by_way_MNE.sum(2).flatten(), received_NME.sum((1, 2)))
        parts, sent_W, by_way, received = _numbers(*all_parts)
        copied = self._to_copies(parts, count_E.device)
        first_S = _swapped(torch.tensor(sent_W, device=count_E.device).view(N, M))
        first_S = first_S if copied is None else copied.index_select(0, first_S)
        way_MN = torch.tensor(by_way, device=count_E.device).view(M, N)
        sent_M = [sum(sent_W[m::M]) for m in range(M)]
        received_M = [sum(by_way[m * N : (m + 1) * N]) for m in range(M)]
        sent_N = [sum(by_way[n::N]) for n in range(N)]
        hops = [
            Hop(inner, first_S, sum(parts), sent_M, received_M),
            Hop(outer, _swapped(way_MN), sum(by_way), sent_N, received),
        ]
        return received_NME.flatten(0, 1), hops

    def static(self, num_rows: int, device: torch.device) -> list[Hop]:
        """Return the hops of R rows that are an equal part for each part of the experts."""
        each = num_rows // self.num_parts
        copied = self._to_copies([each] * self.num_parts, device)
        if self.levels is None:
            return [Hop(self.group, copied, num_rows, None, None)]
        outer, inner = self.levels
        N, M = dist.get_world_size(outer), dist.get_world_size(inner)
        place_S = torch.arange(N * M * each, device=device)
        first_S = place_S.view(N, M, each).transpose(0, 1).flatten()
        first_S = first_S if copied is None else copied.index_select(0, first_S)
        return [
            Hop(inner, first_S, num_rows, None, None),
            Hop(outer, place_S.view(M, N, each).transpose(0, 1).flatten(), N * M * each, None, None),
        ]

    def _to_copies(self, parts: Sequence[int], device: torch.device) -> Tensor | None:
        """Return the row at each place when every part is repeated ``copies`` times; None if that is once."""
        if self.copies == 1:
            return None
        rows = torch.arange(sum(parts), device=device).split(list(parts))
        return torch.cat([part.repeat(self.copies) for part in rows])

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError("routes hold process groups, which cannot be copied")


def _exchanged(count_W: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return the entries that each rank has for this one."""
    received = torch.empty_like(count_W)
    dist.all_to_all_single(received, count_W, group=group)
    return received


def _numbers(*counts: Tensor) -> list[list[int]]:
    """Return tensors of one axis as lists, in one wait for the device."""
    values = torch.cat(counts).tolist()
    ends = [0]
    for count in counts:
        ends.append(ends[-1] + math.prod(count.shape))
    return [values[start:end] for start, end in pairwise(ends)]


def _swapped(count_AB: Tensor) -> Tensor:
    """Return the index that brings blocks of rows from the order (a, b) to the order (b, a), given their sizes."""
    A, B = count_AB.shape
    key_AB = torch.arange(A * B, device=count_AB.device).view(B, A).T
    key_R = key_AB.flatten().repeat_interleave(count_AB.flatten())
    return key_R.argsort(stable=True)
