"""Experts on several ranks: the mesh, the exchange of rows, and models whose parameters are sharded."""

from .all_to_all import AllToAllDispatcher
from .mesh import expert_mesh
from .shards import shard_experts

__all__ = ["AllToAllDispatcher", "expert_mesh", "shard_experts"]
