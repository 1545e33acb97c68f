"""Fused Triton kernels for CUDA. ``TRITON_INTERPRET=1`` runs them on a CPU, slowly, for tests.

    jit/            the kernels, the only files that import Triton
    environment.py  what can run here
    launch.py       one way to start a kernel
    tuning.py       tiles, and the choice among them
    gate.py sort.py products.py experts.py quantized.py sums.py     custom ops and their launches

Nothing synchronizes with the host: counts stay on the device, and a launch covers the most tiles there can be. Sums
have one order and no atomics, so results are equal bit by bit from run to run.
"""

from __future__ import annotations

import torch

from .environment import MAX_EXPERTS, missing
from .experts import expert_ffn, expert_linear
from .gate import topk_gate
from .launch import fastest
from .sort import queue_ranks, sort_pairs
from .sums import combine
from .tuning import key_of


def supports(device: torch.device, dtype: torch.dtype) -> bool:
    return missing(device, dtype) is None


__all__ = [
    "MAX_EXPERTS",
    "combine",
    "expert_ffn",
    "expert_linear",
    "fastest",
    "key_of",
    "missing",
    "queue_ranks",
    "sort_pairs",
    "supports",
    "topk_gate",
]
