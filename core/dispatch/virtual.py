"""Routings of *virtual tokens*: a pair's output is summed to another index than the token that it reads."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..contract import Evidence, Routing
from ..kernels import count_experts


def join_tasks(routings: Sequence[Routing]) -> Routing:
    """Return the routings of t tasks for the same T tokens as one of t * T virtual tokens.

    Virtual token ``k * T + i`` is token i as task k sees it. Losses and statistics still read the tasks' own routings.
    """
    T, first = routings[0].num_tokens, routings[0]
    most = [r.most_per_expert for r in routings]
    same = all(r.top_k == first.top_k for r in routings)
    return Routing(
        token_index_N=torch.cat([r.token_index_N + k * T for k, r in enumerate(routings)]),
        expert_ids_N=torch.cat([r.expert_ids_N for r in routings]),
        gates_N=torch.cat([r.gates_N for r in routings]),
        tokens_per_expert_E=sum((r.tokens_per_expert_E for r in routings[1:]), first.tokens_per_expert_E),
        chosen_per_expert_E=sum((r.chosen_per_expert_E for r in routings[1:]), first.chosen_per_expert_E),
        num_tokens=len(routings) * T,
        top_k=first.top_k if same else None,
        input_index_N=torch.cat([r.token_index_N for r in routings]),
        most_per_expert=None if None in most else sum(m for m in most if m is not None),
        evidence=Evidence(),
    )


def split_pairs(token_index_N: Tensor, expert_ids_N: Tensor, tokens_per_expert_E: Tensor) -> Routing:
    """Return a routing whose every pair is a virtual token of weight 1, so that ``combine`` gives (N, D_out).

    Args:
        token_index_N, expert_ids_N, tokens_per_expert_E: as in ``Routing``. The output of a pair that is not computed
            is zero.
    """
    N, device = expert_ids_N.shape[0], expert_ids_N.device
    return Routing(
        token_index_N=torch.arange(N, device=device),
        expert_ids_N=expert_ids_N,
        gates_N=torch.ones(N, dtype=torch.float32, device=device),
        tokens_per_expert_E=tokens_per_expert_E,
        chosen_per_expert_E=tokens_per_expert_E,
        num_tokens=N,
        top_k=1,
        input_index_N=token_index_N,
        evidence=Evidence(),
    )


def unique_pairs(joined: Routing, num_tokens: int) -> tuple[Routing, Tensor]:
    """Return the pairs that compute several tasks' choices, each expert once per token, and each pair's place in them.

    Args:
        joined: routing of the tasks' virtual tokens, as ``join_tasks`` returns it.
        num_tokens: T.

    Returns:
        a routing like the one of ``split_pairs``, in which only the first pair of a token and an expert is computed;
        and int64 (N,), the number of that first pair for each pair.
    """
    token_N, expert_ids_N, E = joined.input_index_N, joined.expert_ids_N, joined.tokens_per_expert_E.shape[0]
    assert token_N is not None
    number_N, key_N = torch.arange(expert_ids_N.shape[0], device=expert_ids_N.device), token_N * (E + 1) + expert_ids_N
    first_K = number_N.new_zeros(num_tokens * (E + 1))
    first_N = first_K.scatter_reduce(0, key_N, number_N, "amin", include_self=False).index_select(0, key_N)
    expert_ids_N = expert_ids_N.masked_fill(first_N != number_N, E)
    return split_pairs(token_N, expert_ids_N, count_experts(expert_ids_N, E)), first_N
