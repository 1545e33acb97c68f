"""The parts of a layer put together: ``MoEConfig``, ``MultiGateConfig``, ``DenseFFN``. They are the YAML schema."""

from .dense import DenseFFN
from .moe import LAYERS, MoEConfig
from .multi_gate import CGC, PLE, MMoE, MultiGateConfig, OMoE
from .rank_mixer import RankMixer
from .scenarios import STAR, HoME, M3oE
from .smes import SMES

__all__ = [
    "CGC",
    "DenseFFN",
    "HoME",
    "M3oE",
    "MMoE",
    "MoEConfig",
    "MultiGateConfig",
    "OMoE",
    "PLE",
    "RankMixer",
    "SMES",
    "STAR",
]
