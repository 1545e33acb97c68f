"""Conversions of a layer that is built, and may be trained, into another one: so far, one with more experts."""

from .grow import freeze_experts, grow_experts

__all__ = ["freeze_experts", "grow_experts"]
