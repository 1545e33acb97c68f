"""The pairs in the order of their experts, and each pair's place in its expert's queue: a stable counting sort."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import eager
from ..eager import Sorted
from .launch import Launch, power_of_two

BLOCK = 128
MAX_BINS = 4096
"""Queues that a block of pairs counts at once, in registers; beyond it the general sort is as good."""


@torch.library.custom_op("moesaic::triton_places", mutates_args=())
def places(ids: Tensor, bins: int, num_tokens: int, top_k: int, served_T: Tensor | None) -> tuple[Tensor, Tensor]:
    """Where each pair stands when pairs are sorted by id, earlier pairs first; and how many there are of lower ids.

    Args:
        ids: int64 (N,), in ``range(bins)``.
        bins: number of ids.
        num_tokens, top_k: with ``top_k`` above 0 the order of the pairs, which are token-major, is that of queues:
            first choices before second ones. 0: the order of the pairs is their own.
        served_T: int64 (T,), the tokens in the order in which they are served; None: as they come.

    Returns:
        int64 (N,) places; int32 (bins,) starts.
    """
    return find_places(ids, bins, num_tokens, top_k, served_T)


@places.register_fake
def _(ids, bins, num_tokens, top_k, served_T):
    return torch.empty_like(ids), ids.new_empty(bins, dtype=torch.int32)


def find_places(ids: Tensor, bins: int, num_tokens: int, top_k: int, served_T: Tensor | None) -> tuple[Tensor, Tensor]:
    """The launches of ``places``."""
    N, device = ids.shape[0], ids.device
    found = torch.empty(N, dtype=torch.int64, device=device)
    if N == 0:
        return found, torch.zeros(bins, dtype=torch.int32, device=device)
    blocks = -(-N // BLOCK)
    counts = torch.empty(bins, blocks, dtype=torch.int32, device=device)
    flags = {"ORDERED": served_T is not None, "IN_QUEUE": top_k > 0, "BLOCK": BLOCK}
    served = ids if served_T is None else served_T.contiguous()
    ids, sizes = ids.contiguous(), (N, max(num_tokens, 1), max(top_k, 1))
    # One bin more, for what is past the last pair.
    binned = flags | {"BINS_POW2": power_of_two(bins + 1)}
    Launch("sort.count", (ids, served, counts, *sizes, bins, blocks), binned, lambda _: blocks).run()
    ends = counts.flatten().cumsum(0, dtype=torch.int32)
    starts = (ends - counts.flatten()).view(bins, blocks)
    Launch("sort.place", (ids, served, starts, found, *sizes, blocks), flags, lambda _: blocks).run()
    return found, starts[:, 0].clone()


def sort_pairs(expert_ids_N: Tensor, tokens_per_expert_E: Tensor) -> Sorted:
    """As ``eager.sort_pairs``."""
    if tokens_per_expert_E.shape[0] >= MAX_BINS:
        return eager.sort_pairs(expert_ids_N, tokens_per_expert_E)
    inverse_N, _ = places(expert_ids_N, tokens_per_expert_E.shape[0] + 1, 0, 0, None)
    pair_N = torch.arange(inverse_N.shape[0], device=inverse_N.device)
    order_R = torch.empty_like(inverse_N).scatter_(0, inverse_N, pair_N)
    return Sorted(order_R, inverse_N, tokens_per_expert_E.cumsum(0).to(torch.int32))


def queue_ranks(queue_TK: Tensor, served_T: Tensor | None, num_queues: int) -> Tensor:
    """As ``eager.queue_ranks``."""
    if num_queues > MAX_BINS:
        return eager.queue_ranks(queue_TK, served_T, num_queues)
    T, K = queue_TK.shape
    found_N, starts = places(queue_TK.flatten(), num_queues, T, K, served_T)
    return (found_N - starts.to(torch.int64)[queue_TK.flatten()]).view(T, K)
