"""Offloaded experts: kept in host memory or in a file, and on the device through a few slots."""

from .models import offload_experts, offloadable_bytes
from .offloaded import OffloadedExperts
from .statistics import OffloadStatistics

__all__ = ["OffloadStatistics", "OffloadedExperts", "offload_experts", "offloadable_bytes"]
