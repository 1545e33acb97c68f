"""moesaic's engine: mixture-of-experts layers on PyTorch."""

from .config import MoEConfig
from .contract import Entry, Routing, RoutingContext, Rows, Tape, record
from .experts import FFN, GEGLU, ExpertConfig, Experts, SwiGLU
from .flops import count_flops
from .kernels import resolve_backend
from .layers import (
    AuxLosses,
    MoE,
    MoELayer,
    active_params,
    aux_loss,
    aux_losses,
    moe_layers,
    set_capacity_factor,
    update_expert_bias,
)
from .routing.balance import Balance
from .routing.router import Router, RouterConfig, TokenChoice
from .telemetry import LayerStats, RoutingStats

__all__ = [
    "FFN",
    "GEGLU",
    "AuxLosses",
    "Balance",
    "Entry",
    "ExpertConfig",
    "Experts",
    "LayerStats",
    "MoE",
    "MoEConfig",
    "MoELayer",
    "Router",
    "RouterConfig",
    "Routing",
    "RoutingContext",
    "RoutingStats",
    "Rows",
    "SwiGLU",
    "Tape",
    "TokenChoice",
    "active_params",
    "aux_loss",
    "aux_losses",
    "count_flops",
    "moe_layers",
    "record",
    "resolve_backend",
    "set_capacity_factor",
    "update_expert_bias",
]
