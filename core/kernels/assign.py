"""Balanced assignment of T tokens to E experts: one custom op, without a T x T matrix.

With few experts the problem is a transportation problem whose dual has only E prices. Three steps:

1. Prices: Newton's method on the dual smoothed by a temperature that falls step by step; an E x E system each.
2. Each token takes its best expert at these prices. Scores and prices are whole multiples of a small quantum, so that
   sums are exact and equal scores are ties, which go round the experts.
3. Repair: tokens move along the cheapest path from an expert with too many to one with too few (successive shortest
   paths on E nodes, exact for the rounded scores). Tokens of equal cost move at once.

Each step has a fixed bound. At the bound of step 3 experts pass on the tokens that lose least, and these fill the free
places greedily: balance always holds, and the loss is bounded by the error of the prices.

Steps 2 and 3 decide on the host, hence the custom op. On CUDA each path of step 3 waits for the device.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from .eager import capacity_ranks, count_experts

# Temperatures of step 1 in units of the scores' spread, and Newton steps at each.
TEMPERATURES = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 0.0003)
NEWTON_STEPS = 3
# Down to this temperature a sample of about so many scores is enough.
COARSE, SAMPLE = 0.1, 2**15
# The scores' spread in quanta: a token loses at most one.
QUANTA = 2.0**20
# Of a score in quanta. Paths over 2**9 experts stay below FORCED, and sums with it are integers in float64.
BOUND, FORCED = 2.0**40, 2.0**51


def max_paths(num_experts: int) -> int:
    """Bound of step 3."""
    return 64 + 8 * num_experts


@torch.library.custom_op("moesaic::balanced_assignment", mutates_args=())
def balanced_assignment(scores_TE: Tensor, real_T: Tensor | None = None) -> Tensor:
    """The experts of T tokens that maximize the sum of their scores, with equally many tokens each.

    Every expert gets ``floor(n / E)`` or ``ceil(n / E)`` of the n non-padding tokens (BASE, arXiv 2103.16716).
    Deterministic. Not differentiable: the choice is constant almost everywhere.

    Args:
        scores_TE: (T, E), any float dtype. NaN counts as 0.
        real_T: bool (T,), False for padding; None: every token is real.

    Returns:
        int64 (T,), the expert of each token, E for padding.
    """
    E = scores_TE.shape[1]
    if real_T is None:
        return _assign(scores_TE)
    expert_T = torch.full_like(real_T, E, dtype=torch.int64)
    expert_T[real_T] = _assign(scores_TE[real_T])
    return expert_T


@balanced_assignment.register_fake
def _(scores_TE, real_T=None):
    return scores_TE.new_empty(scores_TE.shape[0], dtype=torch.int64)


def _assign(scores_TE: Tensor) -> Tensor:
    T, E = scores_TE.shape
    if T == 0 or E == 1:
        return torch.zeros(T, dtype=torch.int64, device=scores_TE.device)
    # A token's mean changes nothing; an expert's mean, a skew common to all tokens, is its first price.
    u_TE = scores_TE.to(torch.float64).nan_to_num(0.0, 1e30, -1e30)
    u_TE -= u_TE.mean(-1, keepdim=True)
    mean_E = u_TE.mean(0)
    rest_TE = u_TE - mean_E
    # Where skew is all there is, the rest is the rounding of the scores.
    spread = torch.maximum(rest_TE.abs().mean(), 1e-6 * u_TE.abs().mean()).clamp_min(1e-300)
    price_E = _prices((rest_TE / spread).to(torch.float32).T.contiguous())
    quantum = spread / QUANTA
    q_TE = (u_TE / quantum).round_().clamp_(-BOUND, BOUND)
    expert_T = _best(q_TE, (price_E * QUANTA + mean_E / quantum).round().clamp_(-BOUND, BOUND))
    expert_T, balanced = _repair(q_TE, expert_T)
    return expert_T if balanced else _fill(q_TE, expert_T)


def _prices(u_ET: Tensor) -> Tensor:
    """float64 prices (E,) at which the experts' loads are about equal, for float32 scores of spread 1.

    Minimizes ``sum_t tau * logsumexp((u_t - p) / tau) + T / E * sum_e p_e``: its gradient is ``T / E - load``, its
    Hessian ``(diag(load) - P P^T) / tau`` with the softmax P.
    """
    E, T = u_ET.shape
    price_E = u_ET.new_zeros(E)
    sample_ET = u_ET[:, :: max(1, T * E // SAMPLE)].contiguous()
    for tau in TEMPERATURES:
        scaled_ET = (sample_ET if tau >= COARSE else u_ET) / tau
        price_E = price_E / tau
        target = scaled_ET.shape[1] / E
        # Prices are free up to a common constant, and without undecided tokens the curvature is zero.
        ridge_EE = torch.eye(E, device=u_ET.device) * (0.01 * target)
        for _ in range(NEWTON_STEPS):
            p_ET = (scaled_ET - price_E[:, None]).softmax(0)
            load_E = p_ET.sum(1)
            hessian_EE = torch.diag(load_E).addmm_(p_ET, p_ET.T, alpha=-1).add_(ridge_EE)
            # A step beyond twice the temperature would leave the softmax that the Hessian is made of.
            price_E = price_E + torch.linalg.solve_ex(hessian_EE, load_E - target)[0].clamp_(-2.0, 2.0)
        price_E = price_E * tau
    return price_E.to(torch.float64)


def _best(q_TE: Tensor, price_E: Tensor) -> Tensor:
    """The best expert of each token at these prices, (T,). Of tied ones, token t takes the next from expert t mod E."""
    T, E = q_TE.shape
    turn_E = torch.arange(E, device=q_TE.device)
    after_EE = (turn_E - turn_E[:, None]) % E
    after_TE = after_EE.to(q_TE.dtype)[torch.arange(T, device=q_TE.device) % E]
    return torch.add(after_TE, q_TE - price_E, alpha=E).argmax(-1)


def _repair(q_TE: Tensor, expert_T: Tensor) -> tuple[Tensor, bool]:
    """Move tokens until counts differ by one at most and no move gains; False where the bound came first.

    Nodes are experts; an edge from a to b costs the loss of the token of a that loses least by going to b. No cycle
    gains at the start, as each token is at its best by the prices, and moving along the cheapest path keeps it so.
    """
    T, E = q_TE.shape
    counts = count_experts(expert_T, E).tolist()
    order_T = expert_T.argsort(stable=True)
    # Each expert's tokens and their rows, so that a move only touches the experts on its path.
    tokens, rows = list(order_T.split(counts)), list(q_TE[order_T].split(counts))
    cost_EE = q_TE.new_full((E, E), torch.inf)
    changed, balanced = list(range(E)), False
    for _ in range(max_paths(E)):
        for a in changed:
            if counts[a]:
                cost_EE[a] = (rows[a][:, a : a + 1] - rows[a]).amin(0)
            else:
                cost_EE[a] = torch.inf
        over = [count - T // E for count in counts]
        # An expert with two too many must give, one with too few must take; in between it may.
        give = [-FORCED if n > 1 else 0.0 if n == 1 else torch.inf for n in over]
        take = [-FORCED if n < 0 else 0.0 if n == 0 else torch.inf for n in over]
        path = _cheapest_path(cost_EE, cost_EE.new_tensor(give), cost_EE.new_tensor(take))
        if not path:
            balanced = True
            break
        edges = list(pairwise(path))
        ties = [(rows[a][:, a] - rows[a][:, b] == cost_EE[a, b]).nonzero()[:, 0] for a, b in edges]
        count = min(max(over[path[0]] - 1, 1), max(-over[path[-1]], 1), *map(len, ties))
        moving = [(tokens[a][tie[:count]], rows[a][tie[:count]]) for (a, _), tie in zip(edges, ties, strict=True)]
        for (a, _), tie in zip(edges, ties, strict=True):
            stays = torch.ones_like(tokens[a], dtype=torch.bool).index_fill_(0, tie[:count], False)
            tokens[a], rows[a] = tokens[a][stays], rows[a][stays]
        for (_, b), (moved, moved_rows) in zip(edges, moving, strict=True):
            tokens[b], rows[b] = torch.cat((tokens[b], moved)), torch.cat((rows[b], moved_rows))
        counts[path[0]] -= count
        counts[path[-1]] += count
        changed = path
    for e in range(E):
        expert_T[tokens[e]] = e
    return expert_T, balanced


def _cheapest_path(cost_EE: Tensor, give_E: Tensor, take_E: Tensor) -> list[int]:
    """The cheapest path by give + edges + take (Bellman-Ford); empty if no path has a negative cost."""
    E = len(cost_EE)
    distance_E, before_E = give_E, torch.full_like(give_E, -1, dtype=torch.int64)
    for _ in range(E - 1):
        best_E, from_E = (distance_E[:, None] + cost_EE).min(0)
        closer_E = best_E < distance_E
        if not closer_E.any():
            break
        distance_E, before_E = torch.where(closer_E, best_E, distance_E), torch.where(closer_E, from_E, before_E)
    cost, end = (distance_E + take_E).min(0)
    if cost >= 0:
        return []
    before, path = before_E.tolist(), [int(end)]
    while before[path[0]] >= 0 and len(path) < E:
        path.insert(0, before[path[0]])
    return path


def _fill(q_TE: Tensor, expert_T: Tensor) -> Tensor:
    """Full experts pass on the tokens that lose least, and these take the best free places, as many at once as fit."""
    T, E = q_TE.shape
    place_T = torch.arange(T, device=q_TE.device)
    count_E = count_experts(expert_T, E)
    fullest_E = count_E.argsort(descending=True, stable=True)
    room_E = torch.full_like(count_E, T // E)
    room_E[fullest_E[: T % E]] += 1

    def first(expert_T: Tensor, score_T: Tensor, room_E: Tensor) -> Tensor:
        """The best of each expert's tokens that it has room for, bool (T,); False for tokens of expert E."""
        order_T = torch.empty_like(place_T)
        order_T[score_T.argsort(descending=True, stable=True)] = place_T
        rank_T = capacity_ranks(expert_T, order_T, E + 1)
        return rank_T < torch.cat((room_E, room_E.new_zeros(1)))[expert_T]

    open_TE = q_TE.masked_fill(count_E >= room_E, -torch.inf)
    loss_T = q_TE.gather(1, expert_T[:, None])[:, 0] - open_TE.amax(-1)
    expert_T = expert_T.where(first(expert_T, loss_T, room_E), E)
    for _ in range(E):  # each round fills an expert, or is the last
        free_E = room_E - count_experts(expert_T, E)
        score_T, bid_T = q_TE.masked_fill(free_E <= 0, -torch.inf).max(-1)
        bid_T = bid_T.where(expert_T == E, E)
        expert_T = bid_T.where(first(bid_T, score_T, free_E), expert_T)
    return expert_T
