"""Tensors that are sharded over ranks in different ways: their parts, their norm, and clipping by it."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..torch_internals import local_place


def total_norm(tensors: Iterable[Tensor]) -> Tensor:
    """Return the Euclidean norm of all tensors together, float32 (), on every rank, in one collective.

    torch's own function mixes no meshes.

    Args:
        tensors: plain ones, the same on each rank, and ``DTensor`` of meshes that hold every rank of the default group
            the same number of times.
    """
    world = dist.get_world_size()
    squares = [torch.zeros(())]
    for tensor in tensors:
        square = local_part(tensor.detach()).float().square().sum()
        squares.append(square / _copies(tensor, world))
    total = torch.stack([square.to(squares[-1].device) for square in squares]).sum()
    dist.all_reduce(total)
    return total.sqrt()


def _copies(tensor: Tensor, world: int) -> int:
    """Return how many ranks hold each number of a tensor."""
    if not isinstance(tensor, DTensor):
        return world
    mesh = tensor.device_mesh
    parts = [mesh.size(axis) for axis, placement in enumerate(tensor.placements) if not placement.is_replicate()]
    return world // math.prod(parts)


def clip_grad_norm(parameters: Iterable[Tensor], limit: float) -> Tensor:
    """Scale the gradients down in place to a total norm of at most ``limit``, and return the norm before, ().

    Every rank calls it. The norm covers the whole model, however its parameters are sharded.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    norm = total_norm(grads)
    factor = (limit / (norm + 1e-6)).clamp(max=1.0)
    for grad in grads:
        local = local_part(grad)
        local.mul_(factor.to(local.device, local.dtype))
    return norm


def local_part(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this rank holds, as a view: all of a plain one."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def needs_all_ranks(model: nn.Module) -> bool:
    """Return whether a model only runs on all ranks together: its parameters are sharded, or gathered by FSDP2."""
    return any(isinstance(p, DTensor) for p in model.parameters())


def copy_part(target: DTensor, whole: Tensor) -> DTensor:
    """Copy this rank's part of a tensor that every rank has into ``target``, and return it.

    Args:
        target: of any mesh and placements.
        whole: of the same shape.
    """
    target.to_local().copy_(part_of(whole, target))
    return target


def part_of(whole: Tensor, like: Tensor) -> Tensor:
    """Return the part of a tensor that every rank has which this rank holds of another one, as a view.

    Args:
        whole: of any device.
        like: of the same shape; all of ``whole`` where it is a plain tensor.
    """
    if not isinstance(like, DTensor):
        return whole
    return whole[local_place(whole.shape, like.device_mesh, like.placements)]


def whole_of(tensor: Tensor) -> Tensor:
    """Return all of a tensor, put together from the ranks' parts, all of which call it: a plain one as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
