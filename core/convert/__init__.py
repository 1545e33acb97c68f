"""Convert models, also trained ones: sparsify, densify, grow, prune, merge, add adapters."""

from .build.adapt import add_adapters
from .build.adapters import merge_adapters
from .build.grow import freeze_experts, grow_experts, hold_experts
from .build.low_rank import use_adapters
from .build.sparse_ffn import SparseFFN, put_layer
from .build.sparsify import matching_parts, sparsify
from .build.starts import (
    STARTS,
    CopyStart,
    DropStart as DropStart,
    GranularStart,
    RandomStart,
    SplitStart as SplitStart,
    Start as Start,
)
from .measure.models import average_models, average_states, example_gates, mix_models
from .measure.statistics import ExpertStatistics, expert_statistics
from .measure.summary import Summary, summary
from .measure.twin import TwinWidth, dense_twin, twin_widths as twin_widths
from .measure.widths import SolvedWidth, has_width, hidden_width, nearest_width, same_width, solve_width, widened
from .read.feed_forward import (
    FeedForwardPart,
    activation_name,
    affine as affine,
    feed_forward_part as feed_forward_part,
)
from .read.readers import read_ffn, recognized_ffns, register_ffn as register_ffn
from .reduce.cut_out import cut_out
from .reduce.densify import densify
from .reduce.importance import unit_importances as unit_importances
from .reduce.merge import OneExpert, average_experts
from .reduce.prune import keep_experts, merge_experts, prune_experts

__all__ = [
    "ExpertStatistics",
    "OneExpert",
    "add_adapters",
    "average_experts",
    "average_models",
    "average_states",
    "cut_out",
    "dense_twin",
    "densify",
    "example_gates",
    "expert_statistics",
    "freeze_experts",
    "grow_experts",
    "hold_experts",
    "keep_experts",
    "merge_adapters",
    "merge_experts",
    "mix_models",
    "prune_experts",
    "sparsify",
    "summary",
    "use_adapters",
]
