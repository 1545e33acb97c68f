"""The parts of a layer put together: ``MoEConfig``, or ``MultiGateConfig`` for several tasks: the YAML schema."""

from .moe import LAYERS, MoEConfig
from .multi_gate import CGC, PLE, MMoE, MultiGateConfig, OMoE

__all__ = ["CGC", "LAYERS", "MMoE", "MoEConfig", "MultiGateConfig", "OMoE", "PLE"]
