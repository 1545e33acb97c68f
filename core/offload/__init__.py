"""Offloaded experts: kept in host memory or in a file, and on the device through a few slots."""

from ..experts.unloaded import unloaded_experts
from .models import loading_experts, offload_experts, offloadable_bytes
from .offloaded import OffloadedExperts
from .statistics import OffloadStatistics

__all__ = ["OffloadStatistics", "OffloadedExperts", "offload_experts"]
