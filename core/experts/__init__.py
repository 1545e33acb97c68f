"""Experts with stacked parameters: one tensor holds a weight of all E experts. A config lies beside what it builds."""

from .base import ExpertConfig, Experts
from .ffn import FFN, GEGLU, FFNExperts, SwiGLU
from .mlp import MLP, MLPExperts

__all__ = ["FFN", "GEGLU", "MLP", "ExpertConfig", "Experts", "FFNExperts", "MLPExperts", "SwiGLU"]
