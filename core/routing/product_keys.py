"""``ProductKeys``: the choice among n^2 experts by 2 n keys (PEER, arXiv 2407.04153; PKM, arXiv 1907.05242)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..contract import Evidence
from ..fields import Count
from ..index_buffers import IndexBuffers
from ..kernels import best_keys
from ..kernels.eager import check_devices
from .router import FixedKConfig, PairRouter, Tokens
from .selection import Capacity, Choice

MOMENTUM, EPS = 0.1, 1e-5


class ProductKeysRouter(IndexBuffers, PairRouter):
    """The router of ``ProductKeys``. Expert ``e = i n + j`` has the i-th key of the first half and the j-th of the
    second one.

    Parameters: ``w_query`` (H Q, D); ``keys`` (2, 1, n, Q / 2), or (2, H, n, Q / 2) with keys of each head's own;
    with batch norm ``norm_weight`` and ``norm_bias`` (H Q,). Buffers with batch norm: ``running_mean``,
    ``running_var`` (H Q,).
    """

    config: ProductKeys
    pair_index_2P: Tensor

    def __init__(self, dim: int, num_experts: int, config: ProductKeys, capacity: Capacity) -> None:
        super().__init__(dim, num_experts, config, capacity)
        self.num_keys, width = math.isqrt(num_experts), config.width(dim)
        features, sets = config.heads * width, 1 if config.shared_keys else config.heads
        self.w_query = nn.Parameter(torch.empty(features, dim))
        self.keys = nn.Parameter(torch.empty(2, sets, self.num_keys, width // 2))
        normed = config.query_norm == "batch"
        self.norm_weight = nn.Parameter(torch.empty(features)) if normed else None
        self.norm_bias = nn.Parameter(torch.empty(features)) if normed else None
        for name in ("running_mean", "running_var"):
            self.register_buffer(name, torch.empty(features) if normed else None)
        self.keep_indices(pair_index_2P=self._pairs())
        self.reset_parameters()

    def _pairs(self) -> list[tuple[int, ...]]:
        """Return the places (i, j) among the two sorted halves that the best K sums may have, (2, P).

        Each place (i', j') with i' <= i and j' <= j has a sum at least as large, so that a place needs
        ``(i + 1) (j + 1) <= K``.
        """
        K, per_half = self.config.top_k, min(self.config.top_k, self.num_keys)
        places = [(i, j) for i in range(per_half) for j in range(per_half) if (i + 1) * (j + 1) <= K]
        return list(zip(*places, strict=True))

    def reset_parameters(self) -> None:
        """Start queries and keys as normal, so that a score has variance 1 where a token's numbers have."""
        super().reset_parameters()
        self.fill_indices()
        nn.init.normal_(self.w_query, std=self.w_query.shape[1] ** -0.5)
        nn.init.normal_(self.keys, std=(2 * self.keys.shape[-1]) ** -0.5)
        for name, start in (("norm_weight", 1.0), ("norm_bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
            tensor = getattr(self, name)
            if tensor is not None:
                nn.init.constant_(tensor, start)

    def choose(self, tokens: Tokens) -> Choice:
        x_TD, H, K, n = tokens.x_TD, self.config.heads, self.config.top_k, self.num_keys
        check_devices(x_TD, type(self).__name__, self._parameters)
        q_TC = self._norm(F.linear(x_TD, self.w_query.to(x_TD.dtype)), tokens)
        q_TH2Q = q_TC.unflatten(1, (H, 2, self.keys.shape[-1]))
        per_half = min(K, n)
        halves = [self._best(q_TH2Q[:, :, half], self.keys[half].to(x_TD.dtype), per_half) for half in (0, 1)]
        (first, i_THK), (second, j_THK) = halves
        place_i, place_j = self.pair_index_2P
        # Of all K^2 sums of two sorted lists the best K are among these few.
        sums_THP = first.index_select(2, place_i) + second.index_select(2, place_j)
        best = sums_THP.topk(K, dim=-1)
        i_THK = i_THK.gather(2, place_i[best.indices])
        j_THK = j_THK.gather(2, place_j[best.indices])
        gates_THK = best.values.softmax(-1)
        return Choice((i_THK * n + j_THK).flatten(1), gates_THK.flatten(1), Evidence())

    def _best(self, q_THQ: Tensor, keys_SnQ: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        """Return the best sub-keys of one half of the queries, (T, H, top_k) scores and indices."""
        T, H, _ = q_THQ.shape
        if keys_SnQ.shape[0] == 1:
            values_RK, index_RK = best_keys(q_THQ.flatten(0, 1), keys_SnQ[0], top_k, backend=self.backend)
            return values_RK.unflatten(0, (T, H)), index_RK.unflatten(0, (T, H))
        each = [best_keys(q_THQ[:, h], keys_SnQ[h], top_k, backend=self.backend) for h in range(H)]
        return torch.stack([values for values, _ in each], 1), torch.stack([index for _, index in each], 1)

    def _norm(self, q_TC: Tensor, tokens: Tokens) -> Tensor:
        """Return the queries after the norm: in training by the statistics of the non-padding tokens, which the running
        ones follow; in evaluation, and with fewer than two non-padding tokens, by the running ones."""
        if self.norm_weight is None or self.norm_bias is None:
            return q_TC
        mean_C, var_C = (getattr(self, name).to(q_TC.dtype) for name in ("running_mean", "running_var"))
        if self.training:
            real_T1 = tokens.real_T[:, None]
            count = real_T1.sum()
            own_C = q_TC.masked_fill(~real_T1, 0.0).sum(0) / count.clamp_min(1)
            squares_C = (q_TC - own_C).masked_fill(~real_T1, 0.0).square().sum(0)
            enough = count >= 2
            with torch.no_grad():
                # The running variance is the unbiased one, as in ``nn.BatchNorm1d``.
                for name, new in (("running_mean", own_C), ("running_var", squares_C / (count - 1).clamp_min(1))):
                    kept = getattr(self, name)
                    kept.copy_(torch.where(enough, kept + MOMENTUM * (new - kept), kept))
            mean_C, var_C = torch.where(enough, own_C, mean_C), torch.where(enough, squares_C / count, var_C)
        scale_C = (var_C + EPS).rsqrt() * self.norm_weight.to(q_TC.dtype)
        return (q_TC - mean_C) * scale_C + self.norm_bias.to(q_TC.dtype)

    def extra_repr(self) -> str:
        return f"num_experts={self.num_experts}, num_keys={self.num_keys}, heads={self.config.heads}"


@dataclass(frozen=True)
class ProductKeys(FixedKConfig):
    """Product-key retrieval (PEER, arXiv 2407.04153): the experts of a head are the K best of n^2, by 2 n sub-keys.

    The query ``q_h(x)`` of a head has two halves, each of which is scored against n sub-keys; the score of expert
    ``i n + j`` is the sum of two. The K best sums are exactly those of all n^2: they are sums of the K best of each
    half. The gates are the softmax over the K scores of a head, so that a token's gates sum to the number of heads. Two
    heads may take the same expert.

    Attributes:
        top_k: experts per head, K; a token takes K times ``heads``.
        heads: H.
        query_dim: Q, the width of a head's query; None: D, or D + 1 where D is odd.
        query_norm: "none", or "batch": the queries are batch-normalized, which spreads the load (section 3.4). In
            training a query then depends on its batch-mates, and a forward moves the running statistics.
        shared_keys: all heads have the same sub-keys, as in the paper; False: each head its own, as in product-key
            memories (arXiv 1907.05242).

    Raises:
        ValueError: ``query_dim`` is odd; in ``check``, E is not a square or is below K.
    """

    paper = "2407.04153"
    router_class = ProductKeysRouter
    layer_options = frozenset({"backend"})

    top_k: Count = 16
    heads: Count = 8
    query_dim: Count | None = None
    query_norm: Literal["none", "batch"] = "none"
    shared_keys: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.query_dim is not None and self.query_dim % 2:
            raise ValueError(f"query_dim={self.query_dim} is odd: a query has two halves")

    def check(self, num_experts: int) -> None:
        if math.isqrt(num_experts) ** 2 != num_experts:
            raise ValueError(f"num_experts={num_experts} is no square: two sets of n sub-keys make n * n experts")
        super().check(num_experts)

    def width(self, dim: int) -> int:
        """Return Q for this model dim, the default filled in."""
        return dim + dim % 2 if self.query_dim is None else self.query_dim

    @property
    def is_causal(self) -> bool:
        return self.query_norm == "none"

    @property
    def depends_on(self) -> str:
        return "token"

    @property
    def moves_statistics(self) -> bool:
        return self.query_norm == "batch"

    @property
    def repeats_experts(self) -> bool:
        return self.heads > 1

    def pairs_per_token(self, num_experts: int) -> float:
        return float(self.top_k * self.heads)

    def num_params(self, dim: int, num_experts: int) -> int:
        width = self.width(dim)
        keys = (1 if self.shared_keys else self.heads) * math.isqrt(num_experts) * width
        return self.heads * width * (dim + (2 if self.query_norm == "batch" else 0)) + keys

    def flops_per_token(self, dim: int, num_experts: int) -> int:
        return 2 * self.heads * self.width(dim) * (dim + math.isqrt(num_experts))
