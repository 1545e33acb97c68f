"""moesaic's engine: mixture-of-experts layers on PyTorch."""

from .config import CGC, PLE, DenseFFN, MMoE, MoEConfig, MultiGateConfig, OMoE
from .contract import (
    DenseRouting,
    Entry,
    Evidence,
    MergeRouting,
    Routing,
    RoutingContext,
    Rows,
    SlotRouting,
    Tape,
    record,
)
from .convert import freeze_experts, grow_experts
from .experts import FFN, GEGLU, MLP, Constant, Copy, ExpertConfig, Experts, Mixed, MLPExperts, SwiGLU, Zero
from .experts import (
    FFN,
    GEGLU,
    MLP,
    ClampedSwiGLU,
    AttentionExperts,
    Constant,
    Copy,
    ExpertConfig,
    Experts,
    Mixed,
    MLPExperts,
    SwiGLU,
    Zero,
)
from .flops import count_flops
from .kernels import expert_linear, resolve_backend
from .layers import (
    AttentionMoE,
    AuxLosses,
    MergedMoE,
    MoE,
    MoELayer,
    MultiGateLayer,
    MultiGateMoE,
    PLELayer,
    SelectedMultiGateMoE,
    SoftMoE,
    SparseMultiGateMoE,
    active_params,
    aux_loss,
    aux_losses,
    moe_layers,
    set_capacity_factor,
    update_expert_bias,
)
from .registry import is_registered, register_config, registered_config
from .routing.adaptive import DynamicThreshold, NullExperts, Threshold, TokenRounding
from .routing.assignment import Base, Sinkhorn
from .routing.balance import Balance
from .routing.consistency import consistency_loss
from .routing.expert_choice import ExpertChoice
from .routing.fixed import DomainRandom, Hash, Random
from .routing.groups import Ensemble, Hierarchical, Prototypes
from .routing.learned import Attention, Cosine, Stable
from .routing.per_sequence import Domain, Sentence, Task, domain_posterior
from .routing.relu import ReLURouting
from .routing.router import PairRouter, Router, RouterConfig, Tokens
from .routing.selection import Capacity, Choice
from .routing.smooth import Dense, DenseToSparse, DSelectK
from .routing.soft import Merge, SoftSlots
from .routing.token_choice import TokenChoice
from .telemetry import LayerStats, RoutingStats

__all__ = [
    "CGC",
    "Capacity",
    "Dense",
    "DenseFFN",
    "DenseRouting",
    "DenseToSparse",
    "DSelectK",
    "Attention",
    "AttentionExperts",
    "AttentionMoE",
    "AuxLosses",
    "Balance",
    "Base",
    "Choice",
    "ClampedSwiGLU",
    "Constant",
    "Copy",
    "Cosine",
    "Domain",
    "DomainRandom",
    "DynamicThreshold",
    "Ensemble",
    "Entry",
    "Evidence",
    "ExpertChoice",
    "ExpertConfig",
    "Experts",
    "FFN",
    "GEGLU",
    "Hash",
    "Hierarchical",
    "LayerStats",
    "MLP",
    "MLPExperts",
    "MMoE",
    "Merge",
    "MergeRouting",
    "MergedMoE",
    "Mixed",
    "MoE",
    "MoEConfig",
    "MoELayer",
    "MultiGateConfig",
    "MultiGateLayer",
    "MultiGateMoE",
    "NullExperts",
    "OMoE",
    "PLE",
    "PLELayer",
    "PairRouter",
    "Prototypes",
    "Random",
    "ReLURouting",
    "Router",
    "RouterConfig",
    "Routing",
    "RoutingContext",
    "RoutingStats",
    "Rows",
    "SelectedMultiGateMoE",
    "Sentence",
    "Sinkhorn",
    "SlotRouting",
    "SoftMoE",
    "SoftSlots",
    "SparseMultiGateMoE",
    "Stable",
    "SwiGLU",
    "Tape",
    "Task",
    "Threshold",
    "TokenChoice",
    "TokenRounding",
    "Tokens",
    "Zero",
    "active_params",
    "aux_loss",
    "aux_losses",
    "consistency_loss",
    "count_flops",
    "domain_posterior",
    "expert_linear",
    "freeze_experts",
    "grow_experts",
    "is_registered",
    "moe_layers",
    "record",
    "register_config",
    "registered_config",
    "resolve_backend",
    "set_capacity_factor",
    "update_expert_bias",
]
