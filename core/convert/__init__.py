"""Conversions of what is built, and may be trained: more experts in a layer, one in place of all, updates beside it."""

from .adapt import adapt
from .grow import freeze_experts, grow_experts, hold_experts
from .merge import OneExpert, average_experts

__all__ = ["OneExpert", "adapt", "average_experts", "freeze_experts", "grow_experts", "hold_experts"]
