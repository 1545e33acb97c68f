"""The CPU backend, and the linear layers that use the same matmuls as its experts."""

from ..eager import combine, queue_ranks, sort_pairs, topk_gate
from .experts import expert_ffn, expert_linear, supports
from .pages import keep_freed
from .products import Linear, convert_linear, linear, packed

__all__ = [
    "Linear",
    "combine",
    "convert_linear",
    "expert_ffn",
    "expert_linear",
    "keep_freed",
    "linear",
    "packed",
    "queue_ranks",
    "sort_pairs",
    "supports",
    "topk_gate",
]
