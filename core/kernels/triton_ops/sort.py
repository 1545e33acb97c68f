"""The pairs in the order of their experts, and each pair's place in its expert's queue: a stable counting sort."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import eager
from ..eager import Sorted
from .launch import Launch, power_of_two

BLOCK = 128
MAX_BINS = 4096
"""Most ids that a block of pairs counts in registers. With more of them the general sort is as good."""


def find_places(ids: Tensor, bins: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the position of each pair when pairs are sorted by id, earlier pairs first.

    Args:
        ids: int64 (N,), in ``range(bins)``.
        bins: number of ids.

    Returns:
        int64 (N,) the place of each pair; int64 (N,) the pair of each place; int32 (bins,) inclusive cumulative counts.
    """
    place_N, order_N = (torch.empty_like(ids, memory_format=torch.contiguous_format) for _ in range(2))
    ends = _launch(ids.contiguous(), place_N, order_N, bins, 0, 0, None)
    # A copy, for the operations that read it take no stride.
    return place_N, order_N, ends[:, -1].clone()


_places = torch.library.custom_op("moesaic::triton_places", find_places, mutates_args=())


@_places.register_fake
def _(ids, bins):
    return torch.empty_like(ids), torch.empty_like(ids), ids.new_empty(bins, dtype=torch.int32)


def find_ranks(queue_TK: Tensor, served_T: Tensor | None, num_queues: int) -> Tensor:
    """Return each pair's place in its queue; see ``eager.queue_ranks``."""
    T, K = queue_TK.shape
    ranks_TK = torch.empty_like(queue_TK, memory_format=torch.contiguous_format)
    served = None if served_T is None else served_T.contiguous()
    _launch(queue_TK.contiguous(), ranks_TK, ranks_TK, num_queues, T, K, served)
    return ranks_TK


_ranks = torch.library.custom_op("moesaic::triton_queue_ranks", find_ranks, mutates_args=())


@_ranks.register_fake
def _(queue_TK, served_T, num_queues):
    return torch.empty_like(queue_TK, memory_format=torch.contiguous_format)


def _launch(
    ids: Tensor, place_N: Tensor, order_N: Tensor, bins: int, num_tokens: int, top_k: int, served_T: Tensor | None
) -> Tensor:
    """Count the ids, and write the places of the pairs into ``place_N`` and the pairs of the places into ``order_N``.

    With ``top_k`` above 0 pairs are token-major, first choices come before second ones, and ``place_N`` takes the
    places among the pairs of the same id.

    Returns:
        int32 (bins, blocks) inclusive cumulative counts.
    """
    N = ids.numel()
    blocks = -(-N // BLOCK)
    if N == 0:
        return torch.zeros(bins, 1, dtype=torch.int32, device=ids.device)
    counts = torch.empty(bins, blocks, dtype=torch.int32, device=ids.device)
    flags = {"ORDERED": served_T is not None, "IN_QUEUE": top_k > 0, "BLOCK": BLOCK}
    served, sizes = ids if served_T is None else served_T, (N, max(num_tokens, 1), max(top_k, 1))
    # One more bin takes the entries past the last pair.
    binned = flags | {"BINS_POW2": power_of_two(bins + 1)}
    Launch("sort.count", (ids, served, counts, *sizes, bins, blocks), binned, lambda _: blocks).run()
    ends = counts.flatten().cumsum(0, dtype=torch.int32)
    Launch("sort.place", (ids, served, ends, place_N, order_N, *sizes, blocks), flags, lambda _: blocks).run()
    return ends.view(bins, blocks)


def sort_pairs(expert_ids_N: Tensor, tokens_per_expert_E: Tensor) -> Sorted:
    """Sort as ``eager.sort_pairs`` does, but recount the ids."""
    E = tokens_per_expert_E.shape[0]
    if E >= MAX_BINS:
        return eager.sort_pairs(expert_ids_N, tokens_per_expert_E)
    inverse_N, order_R, ends = _places(expert_ids_N, E + 1)
    return Sorted(order_R, inverse_N, ends[:E])


def queue_ranks(queue_TK: Tensor, served_T: Tensor | None, num_queues: int) -> Tensor:
    """Rank as ``eager.queue_ranks`` does."""
    if num_queues > MAX_BINS:
        return eager.queue_ranks(queue_TK, served_T, num_queues)
    return _ranks(queue_TK, served_T, num_queues)
