"""Exact search among vectors: each query is compared with all of them, some queries at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from core.kernels import outside_autocast

CHUNK_ELEMENTS = 2**24
"""Products at a time: 64 MB."""


class Best(NamedTuple):
    """The best vectors of each query, the best first.

    Attributes:
        place_BK: int64 (B, k), places of the vectors.
        score_BK: float32 (B, k), their inner products with the query.
    """

    place_BK: Tensor
    score_BK: Tensor


def exact_search(query_BD: Tensor, vectors_VD: Tensor, k: int) -> Best:
    """Return the k vectors whose inner products with each query are largest; all of them if there are fewer.

    Args:
        query_BD: float (B, D).
        vectors_VD: float32 (V, D); it is moved to the queries' device.
        k: number of vectors, at least 1.
    """
    return best_of((score_bV for score_bV, _ in products(query_BD, vectors_VD)), min(k, len(vectors_VD)))


def products(query_BD: Tensor, vectors_VD: Tensor, most: int = CHUNK_ELEMENTS) -> Iterator[tuple[Tensor, slice]]:
    """Yield the inner products of some queries with all vectors, float32 (b, V), and which queries they are.

    Args:
        query_BD: float (B, D).
        vectors_VD: float32 (V, D).
        most: largest number of scores at a time; one query is always taken.
    """
    vectors_DV = vectors_VD.to(query_BD.device).t()
    rows = max(1, most // max(len(vectors_VD), 1))
    for begin in range(0, len(query_BD), rows):
        chunk = slice(begin, begin + rows)
        with outside_autocast(query_BD.device):
            score_bV = query_BD[chunk].float() @ vectors_DV
        yield score_bV, chunk


def best_of(score_bV: Iterable[Tensor], k: int) -> Best:
    """Return the k best places of each row of scores, whose chunks (b, V) come one after the other."""
    best = [scores.topk(k, dim=1) for scores in score_bV]
    if not best:
        return Best(torch.empty(0, k, dtype=torch.int64), torch.empty(0, k))
    return Best(torch.cat([b.indices for b in best]), torch.cat([b.values for b in best]))
