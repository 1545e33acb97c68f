"""The mesh of ranks: replicas of the model, shards of its parameters, and experts."""

from __future__ import annotations

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ..contract.checks import at_least_one

REPLICATE, SHARD, EXPERT = AXES = ("replicate", "shard", "expert")
"""Names of the mesh's axes, from the outermost to the one of neighbouring ranks."""


def expert_mesh(experts: int, shards: int = 1, replicas: int | None = None, *, device_type: str = "cpu") -> DeviceMesh:
    """Return the mesh of all ranks, replicas x shards x experts. Every rank has tokens of its own, on each axis.

    The ranks of one ``expert`` group share out the experts of a layer and exchange rows in every layer, so they are
    neighbours, which a machine connects fastest. All else is sharded over ``shard`` and ``expert`` together, and
    copied over ``replicate``.

    Args:
        experts: ranks among which the experts of a layer are divided (the expert-parallel degree).
        shards: groups of such ranks among which parameters are sharded further (FSDP2).
        replicas: copies of the model; None: as many as there are ranks for.
        device_type: "cpu" or "cuda".

    Raises:
        ValueError: the product is not the number of ranks, or a size is below 1.
    """
    at_least_one("experts", experts)
    at_least_one("shards", shards)
    world = dist.get_world_size()
    if replicas is None:
        if world % (experts * shards):
            raise ValueError(f"experts={experts} x shards={shards} does not divide the {world} ranks")
        replicas = world // (experts * shards)
    at_least_one("replicas", replicas)
    if replicas * shards * experts != world:
        sizes = f"replicas={replicas} x shards={shards} x experts={experts}"
        raise ValueError(f"{sizes} is {replicas * shards * experts}, and there are {world} ranks")
    return init_device_mesh(device_type, (replicas, shards, experts), mesh_dim_names=AXES)
