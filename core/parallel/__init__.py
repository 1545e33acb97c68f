"""Experts on several ranks: the mesh, the all-to-all of rows, and models whose parameters are sharded."""

from .all_to_all import AllToAllDispatcher
from .data import average_experts, blocks_of, broadcast_parameters, shard_data, sharded_modules, whole_parameters
from .in_step import InStep
from .mesh import expert_mesh, experts_part
from .parts import clip_grad_norm, copy_part, local_part, needs_all_ranks, part_of, total_norm, whole_of
from .shards import layers_of_experts, refusal, shard_experts

__all__ = [
    "AllToAllDispatcher",
    "InStep",
    "average_experts",
    "blocks_of",
    "broadcast_parameters",
    "clip_grad_norm",
    "copy_part",
    "expert_mesh",
    "experts_part",
    "layers_of_experts",
    "local_part",
    "needs_all_ranks",
    "part_of",
    "refusal",
    "shard_data",
    "shard_experts",
    "sharded_modules",
    "total_norm",
    "whole_of",
    "whole_parameters",
]
