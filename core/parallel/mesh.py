"""The mesh of ranks: replicas of the model, shards of its parameters, and experts."""

from __future__ import annotations

import math

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ..experts.base import HIDDEN
from ..fields import Count, check_values

REPLICATE, SHARD, NODE, EXPERT = "replicate", "shard", "node", "expert"
"""Names of the mesh's axes, from the outermost one to that of neighboring ranks; ``HIDDEN`` is the innermost."""


def expert_mesh(
    experts: int,
    shards: int = 1,
    replicas: int | None = None,
    *,
    nodes: int = 1,
    hidden: int = 1,
    device_type: str = "cpu",
) -> DeviceMesh:
    """Return the mesh of all ranks, replicas x shards x experts. Every rank has tokens of its own, on each axis.

    The ranks of one group of experts share out the experts of a layer and send each other rows in every layer, so they
    are neighbors, which a machine connects fastest. All else is sharded over "shard" and the experts' axes together,
    and copied over "replicate".

    Args:
        experts: ranks that the experts of a layer are sharded over (the expert-parallel degree), on each node.
        shards: groups of such ranks among which parameters are sharded further (FSDP2).
        replicas: copies of the model; None: as many as there are ranks for.
        nodes: machines that share out the experts too: rows travel within a machine first and then between machines.
        hidden: ranks that share out the hidden units of each expert, if there are more ranks than experts.
        device_type: "cpu" or "cuda".

    Returns:
        Axes "replicate", "shard", "node" (if ``nodes`` is above 1), "expert", and "hidden" (if it is above 1).

    Raises:
        ValueError: the product is not the number of ranks, or a size is below 1.
    """
    check_values(Count, shards=shards, nodes=nodes, experts=experts, hidden=hidden)
    check_values(Count | None, replicas=replicas)
    sizes = {SHARD: shards, NODE: nodes, EXPERT: experts, HIDDEN: hidden}
    options = dict(zip(sizes, ("shards", "nodes", "experts", "hidden"), strict=True))
    text = " x ".join(f"{options[name]}={size}" for name, size in sizes.items() if size > 1 or name == EXPERT)
    sizes = {name: size for name, size in sizes.items() if size > 1 or name in (SHARD, EXPERT)}
    world, product = dist.get_world_size(), math.prod(sizes.values())
    if replicas is None:
        if world % product:
            raise ValueError(f"{text} does not divide the {world} ranks")
        replicas = world // product
    if replicas * product != world:
        raise ValueError(f"replicas={replicas} x {text} is {replicas * product}, and there are {world} ranks")
    return init_device_mesh(device_type, (replicas, *sizes.values()), mesh_dim_names=(REPLICATE, *sizes))


def experts_part(mesh: DeviceMesh) -> DeviceMesh | None:
    """Return the axes of a mesh of ``expert_mesh`` over which experts are sharded; None if that is one rank."""
    names = tuple(name for name in mesh.mesh_dim_names or () if name not in (REPLICATE, SHARD))
    part = mesh[names]
    return part if part.size() > 1 else None


def hidden_ranks(mesh: DeviceMesh) -> int:
    """Return over how many ranks of a part of a mesh the hidden units of each expert are sharded: 1, or more."""
    return mesh[HIDDEN].size() if HIDDEN in (mesh.mesh_dim_names or ()) and mesh.ndim > 1 else 1
