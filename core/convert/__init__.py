"""Conversions of what is built, and may be trained: a dense model made sparse and back, more experts or fewer, one in
place of all, updates beside it."""

from .adapt import adapt
from .adapters import merge_adapters
from .cut_out import cut_out
from .densify import densify
from .feed_forward import FeedForwardPart, activation_name, affine, feed_forward_part
from .grow import freeze_experts, grow_experts, hold_experts
from .importance import unit_importances
from .merge import OneExpert, average_experts
from .models import average_models, average_states, mix_models
from .prune import keep_experts, merge_experts, prune_experts
from .readers import read_ffn, recognised_ffns, register_ffn
from .sparse_ffn import SparseFFN, put_layer
from .sparsify import matching_parts, sparsify
from .starts import STARTS, CopyStart, DropStart, GranularStart, RandomStart, SplitStart, Start
from .statistics import ExpertStatistics, expert_statistics
from .summary import Summary, summary
from .twin import TwinWidth, dense_twin, twin_widths
from .widths import SolvedWidth, has_width, hidden_width, nearest_width, same_width, solve_width, widened

__all__ = [
    "CopyStart",
    "DropStart",
    "ExpertStatistics",
    "FeedForwardPart",
    "GranularStart",
    "OneExpert",
    "RandomStart",
    "STARTS",
    "SolvedWidth",
    "SparseFFN",
    "SplitStart",
    "Start",
    "Summary",
    "TwinWidth",
    "activation_name",
    "adapt",
    "affine",
    "average_experts",
    "average_models",
    "average_states",
    "cut_out",
    "dense_twin",
    "densify",
    "expert_statistics",
    "feed_forward_part",
    "freeze_experts",
    "grow_experts",
    "has_width",
    "hidden_width",
    "hold_experts",
    "keep_experts",
    "matching_parts",
    "merge_adapters",
    "merge_experts",
    "mix_models",
    "nearest_width",
    "prune_experts",
    "put_layer",
    "read_ffn",
    "recognised_ffns",
    "register_ffn",
    "same_width",
    "solve_width",
    "sparsify",
    "summary",
    "twin_widths",
    "unit_importances",
    "widened",
]
