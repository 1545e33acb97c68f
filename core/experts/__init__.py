"""Experts with stacked parameters: one tensor holds a weight of all E experts. A config is in the file of its
module."""

from .attention import AttentionExperts
from .base import ExpertConfig, Experts, check_merges, num_params
from .batch_ensemble import BatchEnsemble, BatchEnsembleExperts
from .clamped import ClampedSwiGLU
from .convolution import Convolution, ConvolutionExperts
from .costless import Constant, Identity, Zero
from .ffn import FFN, GEGLU, FFNExperts, SwiGLU
from .general import GeneralFFN
from .low_rank import IA3, LoRA
from .mixed import Mixed
from .mlp import MLP, MLPExperts, batch_norm_rows
from .peer import PEER, NeuronExperts
from .quant import expert_bytes, quantize_experts
from .star import StarExperts

__all__ = [
    "AttentionExperts",
    "BatchEnsemble",
    "BatchEnsembleExperts",
    "ClampedSwiGLU",
    "Constant",
    "Convolution",
    "ConvolutionExperts",
    "Identity",
    "ExpertConfig",
    "Experts",
    "FFN",
    "GEGLU",
    "GeneralFFN",
    "IA3",
    "LoRA",
    "MLP",
    "MLPExperts",
    "Mixed",
    "NeuronExperts",
    "PEER",
    "SwiGLU",
    "Zero",
    "expert_bytes",
    "num_params",
    "quantize_experts",
]
