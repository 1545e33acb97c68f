"""The evidence of several ranks as one: sums of plain tensors, and of the figures of layers that some ranks lack."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..contract import device_of_ranks, several_ranks, sum_over_ranks
from .figures import LayerFigures


def parallel() -> Any:
    """Return ``core.parallel``, which loads much of torch that a model on one process does without."""
    from .. import parallel

    return parallel


def summed(tensors: Sequence[Tensor], group: dist.ProcessGroup | None = None) -> list[Tensor]:
    """Return the sums of float64 tensors over the ranks, on the CPU; every rank calls it with the same shapes."""
    if not several_ranks(group) or not tensors:
        return list(tensors)
    device = device_of_ranks(group)
    return [t.cpu() for t in sum_over_ranks([t.to(device) for t in tensors], group)]


def on_any_rank(here: bool, group: dist.ProcessGroup | None = None) -> bool:
    """Return whether something is so on one rank at least; every rank calls it."""
    (ranks,) = summed([torch.tensor(float(here), dtype=torch.float64)], group)
    return bool(ranks)


def on_every_rank(here: bool, group: dist.ProcessGroup | None = None) -> bool:
    """Return whether something is so on all ranks, each of which calls it."""
    return not on_any_rank(not here, group)


def figures_of_ranks(
    figures: Mapping[str, LayerFigures], group: dist.ProcessGroup | None = None
) -> dict[str, LayerFigures]:
    """Return the sums of the figures over the ranks, by the router's name, the same on each rank.

    Every rank calls it. A router that a rank has no passes of adds nothing there.

    Args:
        figures: this rank's.
        group: the ranks, which have the same model and other tokens; None: all.

    Raises:
        ValueError: a router has other sums on another rank.
    """
    if not several_ranks(group):
        return dict(figures)
    of_ranks: list[dict[str, LayerFigures]] = [{} for _ in range(dist.get_world_size(group))]
    dist.all_gather_object(of_ranks, dict(figures), group=group)
    whole: dict[str, LayerFigures] = {}
    for name, own in (item for of_rank in of_ranks for item in of_rank.items()):
        if name not in whole:
            whole[name] = own
        elif own.outline != whole[name].outline:
            outlines = f"{whole[name].outline} on one rank and {own.outline} on another"
            raise ValueError(f"router {name!r} has sums of {outlines}")
        else:
            whole[name].join(own)
    return whole
