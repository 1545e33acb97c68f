"""Groups of hidden units of a feed-forward network, equal in size: which units become one expert."""

from __future__ import annotations

import torch
from torch import Tensor

from ...experts import FFN, GeneralFFN
from ...experts.general import GENERAL_ACTIVATIONS
from .feed_forward import FeedForwardPart

ROUNDS = 10


def keys_of(part: FeedForwardPart) -> Tensor:
    """Return each hidden unit's input direction, float32 (F, D): the column under its activation."""
    w_DF = part.weights.get("w_gate", part.weights["w_in"])
    return w_DF.t().float().cpu()


def activity_of(part: FeedForwardPart, x_TD: Tensor) -> Tensor:
    """Return how strongly each hidden unit answers each token, float32 (F, T): the size of its output."""
    assert isinstance(part.expert, (FFN, GeneralFFN))

    def product(name: str) -> Tensor:
        y_TF, bias = x_TD @ part.weights[f"w_{name}"], part.weights.get(f"b_{name}")
        return y_TF if bias is None else y_TF + bias

    act, is_gated = GENERAL_ACTIVATIONS[part.expert.activation], "w_gate" in part.weights
    h_TF = act(product("gate")) * product("in") if is_gated else act(product("in"))
    return h_TF.abs().t().float().cpu()


def random_groups(num_units: int, num_groups: int, generator: torch.Generator) -> Tensor:
    """Return the units of each group in ascending order, int64 (groups, units of one), dealt at random."""
    return torch.randperm(num_units, generator=generator).view(num_groups, -1).sort(-1).values


def balanced_clusters(features_FN: Tensor, num_groups: int, generator: torch.Generator) -> Tensor:
    """Return the units of each group in ascending order, int64 (groups, units of one): k-means of equal clusters.

    Features are brought to length 1, so that units are near each other if their features have one direction. In a round
    the nearest pair of a unit and a center comes first, and a full group takes no more units.

    Args:
        features_FN: (F, N), features of each unit.
        num_groups: E, which divides F.
        generator: of the CPU, for the first centers.
    """
    F, E = features_FN.shape[0], num_groups
    x_FN = torch.nn.functional.normalize(features_FN, dim=-1)
    center_EN = _spread_units(x_FN, E, generator)
    group_F = torch.full((F,), -1)
    for _ in range(ROUNDS):
        before_F, group_F = group_F, _nearest_with_room(x_FN @ center_EN.t())
        if torch.equal(before_F, group_F):
            break
        sums_EN = torch.zeros_like(center_EN).index_add(0, group_F, x_FN)
        center_EN = torch.nn.functional.normalize(sums_EN, dim=-1)
    return group_F.argsort(stable=True).view(E, -1)


def _spread_units(x_FN: Tensor, num_groups: int, generator: torch.Generator) -> Tensor:
    """Return first centers (E, N): a random unit, and again and again the one least like those before."""
    chosen = [int(torch.randint(x_FN.shape[0], (), generator=generator))]
    nearest_F = x_FN @ x_FN[chosen[0]]
    while len(chosen) < num_groups:
        nearest_F[chosen] = torch.inf
        chosen.append(int(nearest_F.argmin()))
        nearest_F = torch.maximum(nearest_F, x_FN @ x_FN[chosen[-1]])
    return x_FN[chosen]


def _nearest_with_room(likeness_FE: Tensor) -> Tensor:
    """Return the group of each unit, int64 (F,): the likest pairs first, and F / E units in each group."""
    F, E = likeness_FE.shape
    group, room = [-1] * F, [F // E] * E
    for pair in likeness_FE.flatten().argsort(descending=True, stable=True).tolist():
        unit, e = divmod(pair, E)
        if group[unit] < 0 and room[e]:
            group[unit], room[e] = e, room[e] - 1
    return torch.tensor(group)
