"""The parts of a layer put together: ``MoEConfig``, ``MultiGateConfig``, ``DenseFFN``. They are the YAML schema."""

from .dense import DenseFFN
from .moe import LAYERS, MoEConfig
from .multi_gate import CGC, PLE, MMoE, MultiGateConfig, OMoE

__all__ = ["CGC", "DenseFFN", "LAYERS", "MMoE", "MoEConfig", "MultiGateConfig", "OMoE", "PLE"]
