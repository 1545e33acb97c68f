"""Conversions of a layer that is built, and may be trained, into another one: one with more experts, or with one."""

from .grow import freeze_experts, grow_experts
from .merge import OneExpert, average_experts

__all__ = ["OneExpert", "average_experts", "freeze_experts", "grow_experts"]
