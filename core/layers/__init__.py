"""The layers, and functions for all layers of a model: losses, bias updates, parameter counts."""

from .adapted import AdaptedLinear
from .attention import AttentionMoE
from .base import MoELayer, active_params, moe_layers
from .dense import FeedForward
from .joint import JointMultiGateMoE
from .losses import AuxLosses, aux_loss, aux_losses, update_expert_bias
from .moe import AveragedMoE, MergedMoE, MoE, SoftMoE, set_capacity_factor
from .multi_gate import MultiGateLayer, MultiGateMoE, PLELayer
from .neurons import NeuronMoE
from .patches import PatchMoE
from .rank_mixer import RankMixerLayer
from .replaying import replay
from .scenarios import HoMELayer, M3oELayer, STARLayer
from .shared import SharedGate
from .task_choice import SelectedMultiGateMoE, SparseMultiGateMoE

__all__ = [
    "AdaptedLinear",
    "AttentionMoE",
    "AuxLosses",
    "AveragedMoE",
    "JointMultiGateMoE",
    "MergedMoE",
    "MoE",
    "MoELayer",
    "MultiGateLayer",
    "MultiGateMoE",
    "NeuronMoE",
    "PLELayer",
    "PatchMoE",
    "RankMixerLayer",
    "SelectedMultiGateMoE",
    "SoftMoE",
    "SparseMultiGateMoE",
    "active_params",
    "aux_loss",
    "aux_losses",
    "moe_layers",
    "replay",
    "set_capacity_factor",
    "update_expert_bias",
]
