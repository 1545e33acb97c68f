"""A model whose parameters are copied to ranks, or sharded over them by FSDP2, in addition to its sharded experts."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, cast

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from ..experts import Experts
from ..layers import moe_layers
from .mesh import REPLICATE, SHARD


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Return the modules that repeat: the members with parameters of the outermost lists and sequences of a model."""
    blocks: list[nn.Module] = []
    for child in model.children():
        if isinstance(child, nn.ModuleList | nn.Sequential) and len(child) > 1:
            blocks += [m for m in child if next(m.parameters(), None) is not None]
        else:
            blocks += blocks_of(child)
    return blocks


def average_experts(model: nn.Module, mesh: DeviceMesh, **options: Any) -> list[nn.Module]:
    """Average over all ranks of a mesh the gradients of experts that ``shard_experts`` has sharded, in place.

    FSDP2 copies them over the axis "replicate" and shards them over "shard". Every rank takes the mean over its own
    tokens as its loss. The gradients of all other parameters are left to the caller.

    Args:
        model: the same one on each rank, with the same parameters.
        mesh: of ``expert_mesh``.
        options: options of ``torch.distributed.fsdp.fully_shard``.

    Returns:
        The modules of experts that are sharded.
    """
    divided = {id(p): p for layer in moe_layers(model).values() for p in layer.experts.modules()}
    divided = {i: p for i, p in divided.items() if isinstance(p, Experts) and p.num_local_experts != p.num_experts}
    for part in divided.values():
        fully_shard(part, mesh=mesh[REPLICATE, SHARD], **options)
        # Each rank has added the gradients of the tokens of all ranks along the experts' axis.
        cast(FSDPModule, part).set_gradient_divide_factor(mesh.size())
        # Gloo multiplies nothing on its way; of one shard, torch would divide twice by a forced sum.
        if mesh.device_type == "cpu" and mesh[SHARD].size() > 1:
            cast(FSDPModule, part).set_force_sum_reduction_for_comms(True)
    return list(divided.values())


def shard_data(model: nn.Module, mesh: DeviceMesh, *, shard: bool = True, **options: Any) -> None:
    """Average a model's gradients over all ranks of a mesh, and keep its parameters in shards or copies, in place.

    The blocks (``blocks_of``) and the experts are gathered and freed one by one by FSDP2; modules outside of them, with
    the model. Experts that ``shard_experts`` has sharded over the mesh's axes of experts are copied and sharded over
    the other two, and their gradients are averaged as all others are (``average_experts``).

    Args:
        model: the same one on each rank, with the same parameters.
        mesh: of ``expert_mesh``.
        shard: whether parameters are sharded over all axes but "replicate"; else each rank keeps a copy, as in
            DDP, of all but the sharded experts.
        options: options of ``torch.distributed.fsdp.fully_shard``, such as ``mp_policy`` and
            ``reshard_after_forward``.

    Raises:
        ValueError: ``shard=False`` with more than one rank along "shard".
    """
    world, replicas, shards = mesh.size(), mesh[REPLICATE].size(), mesh[SHARD].size()
    if not shard and shards > 1:
        raise ValueError(f"shards={shards} with shard=False: copies are not sharded")
    sizes = (replicas, world // replicas) if shard else (world, 1)
    rest = init_device_mesh(mesh.device_type, sizes, mesh_dim_names=(REPLICATE, SHARD))
    divided = {id(part) for part in average_experts(model, mesh, **options)}
    for block in blocks_of(model):
        if any(id(m) not in divided and next(m.parameters(recurse=False), None) is not None for m in block.modules()):
            fully_shard(block, mesh=rest, **options)
    fully_shard(model, mesh=rest, **options)


def sharded_modules(model: nn.Module) -> Iterator[FSDPModule]:
    """Yield the modules that FSDP2 gathers and frees."""
    return (m for m in model.modules() if isinstance(m, FSDPModule))


@contextlib.contextmanager
def whole_parameters(model: nn.Module) -> Iterator[None]:
    """Keep what FSDP2 shards whole on every rank inside the ``with`` block, which all ranks enter.

    ``parameters()`` are then plain ones, as are the gradients that ``torch.autograd.grad`` has of them: gradients of
    the rank's own tokens. Experts that ``shard_experts`` has sharded stay sharded.
    """
    parts = list(sharded_modules(model))
    for part in parts:
        part.unshard()
        part.set_reshard_after_backward(False, recurse=False)
        part.set_requires_gradient_sync(False, recurse=False)
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
            part.set_reshard_after_backward(True, recurse=False)
            part.set_requires_gradient_sync(True, recurse=False)


def broadcast_parameters(model: nn.Module) -> None:
    """Give every rank the parameters and buffers of rank 0."""
    for tensor in (*model.parameters(), *model.buffers()):
        dist.broadcast(tensor.detach(), 0)
