"""moesaic's engine: mixture-of-experts layers on PyTorch. The packages' exports are public here too."""

from . import config, contract, convert, experts, layers, offload
from .adopted import adopt, release
from .config import *
from .contract import *
from .convert import *
from .diagnose import *
from .experts import *
from .flops import count_flops
from .kernels import expert_linear, resolve_backend
from .layers import *
from .offload import *
from .optim import RowAdam
from .registry import is_registered, register_config, registered_config
from .routing.balance.balance import Balance
from .routing.balance.consistency import consistency_loss
from .routing.given.fixed import DomainRandom, Hash, Random
from .routing.given.per_sequence import Domain, Sentence, Task, domain_posterior
from .routing.learned import Attention, Cosine, Stable
from .routing.pairs.adaptive import DynamicThreshold, NullExperts, Threshold, TokenRounding
from .routing.pairs.assignment import Base, Sinkhorn
from .routing.pairs.expert_choice import ExpertChoice
from .routing.pairs.groups import Ensemble, Hierarchical, Prototypes
from .routing.pairs.relu import ReLURouting
from .routing.pairs.smooth import Dense, DenseToSparse, DSelectK
from .routing.pairs.sparse_mixer import SparseMixer
from .routing.pairs.token_choice import TokenChoice
from .routing.product_keys import ProductKeys
from .routing.router import PairRouter, Router, RouterConfig, Tokens
from .routing.selection import Capacity, Choice
from .routing.soft.mixed_tokens import MixtureOfTokens
from .routing.soft.soft import Merge, SoftSlots
from .telemetry import LayerStats, RoutingStats

__all__ = [
    "Attention",
    "Balance",
    "Base",
    "Capacity",
    "Choice",
    "Cosine",
    "DSelectK",
    "Dense",
    "DenseToSparse",
    "Domain",
    "DomainRandom",
    "DynamicThreshold",
    "Ensemble",
    "ExpertChoice",
    "Hash",
    "Hierarchical",
    "LayerStats",
    "Merge",
    "MixtureOfTokens",
    "NullExperts",
    "PairRouter",
    "ProductKeys",
    "Prototypes",
    "Random",
    "ReLURouting",
    "Router",
    "RouterConfig",
    "RoutingStats",
    "RowAdam",
    "Sentence",
    "Sinkhorn",
    "SoftSlots",
    "SparseMixer",
    "Stable",
    "Task",
    "Threshold",
    "TokenChoice",
    "TokenRounding",
    "Tokens",
    "adopt",
    "consistency_loss",
    "count_flops",
    "domain_posterior",
    "expert_linear",
    "is_registered",
    "register_config",
    "registered_config",
    "release",
    "resolve_backend",
]
__all__ += config.__all__
__all__ += contract.__all__
__all__ += convert.__all__
__all__ += experts.__all__
__all__ += layers.__all__
__all__ += offload.__all__
__all__ += ["Doctor", "Finding", "TrainingStart", "ablate_experts", "diagnose"]  # the package has a function's name
