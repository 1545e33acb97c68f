"""A PEER layer, batches for it, and the training of one of several processes that hold its tables together."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

import core
from apps.train.checkpoint import sharded
from apps.train.sharded.neuron_tables import shard_tables, sharded_tables

D, E, STEPS = 8, 9, 3
"""Width, experts and steps; 9 rows do not split evenly."""


def layer(**options) -> core.NeuronMoE:
    torch.manual_seed(0)
    return core.MoEConfig(E, core.ProductKeys(top_k=2, heads=2), core.PEER(**options)).build(D)


def batch(step: int) -> Tensor:
    return torch.randn(4, 5, D, generator=torch.Generator().manual_seed(step))


def train_on_whole_batches() -> core.NeuronMoE:
    """Return the layer after three steps on one process."""
    plain = layer()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.5)
    for step in range(STEPS):
        optimizer.zero_grad()
        plain(batch(step)).square().mean().backward()
        optimizer.step()
    return plain


def train_on_a_part(path: Path) -> dict[str, Tensor]:
    """Train on this process's part of the same batches, with sharded tables, and write them to a checkpoint.

    Args:
        path: where the checkpoint goes.

    Returns:
        this process's rows of "u" and "v", the router's weights, and the "output" for ``batch(9)[: 1 + rank]``.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    model = shard_tables(nn.Sequential(layer()), optimizer="sgd", lr=0.5)
    optimizer = torch.optim.SGD([p for p in model.parameters() if not hasattr(p, "_in_backward_optimizers")], lr=0.5)
    for step in range(STEPS):
        optimizer.zero_grad()
        model(batch(step).chunk(world)[rank]).square().mean().backward()
        optimizer.step()
    (tables,) = sharded_tables(model).values()
    sharded.write(path, {"state_dict": {}}, {f"{sharded.WEIGHT}{name}": v for name, v in tables.state_dict().items()})
    rows = {name.split(".")[1]: value.local_shards()[0].tensor.clone() for name, value in tables.state_dict().items()}
    router = {name[name.index("router.") :]: p.detach() for name, p in model.named_parameters() if "router." in name}
    with torch.no_grad():
        return {**rows, **router, "output": model(batch(9)[: 1 + rank]).flatten(0, 1)}
