"""Routers whose logits are their input, and what they decided as plain numbers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from core import Routing, Tape, record
from core.routing.balance.terms import balance_sums, balance_terms
from core.routing.router import PairRouter, RouterConfig
from core.routing.selection import Capacity


def built(
    config: RouterConfig,
    num_experts: int,
    training: bool = False,
    columns: int | None = None,
    limit: Capacity = Capacity(),
) -> PairRouter:
    """Return a router whose logits are its input; its gate has ``columns`` outputs, by default one an expert."""
    columns = columns or num_experts
    router = config.build(columns, num_experts, limit).train(training)
    with torch.no_grad():
        router.gate.weight.copy_(torch.eye(columns))
    return router


def recorded(layer: nn.Module, *args: object) -> Tape:
    """Return the tape of one pass of a layer."""
    with record(layer) as tape:
        layer(*args)
    return tape


def logits_of(*rows: tuple[float, ...]) -> Tensor:
    """Return (1, T, E) logits whose softmax is ``rows``."""
    return torch.tensor(rows).log()[None]


def ids(routing: Routing) -> list[list[int]]:
    """Return the experts of each token."""
    return routing.expert_ids_N.unflatten(0, (routing.num_tokens, -1)).tolist()


def gates(routing: Routing) -> list[list[float]]:
    """Return the gates of each token."""
    return routing.gates_N.unflatten(0, (routing.num_tokens, -1)).tolist()


def terms_of(routing: Routing, *names: str) -> dict[str, float]:
    """Return the balance terms ``names`` of one pass, unweighted."""
    wanted = frozenset(names)
    return {name: value.item() for name, value in balance_terms(balance_sums(routing, wanted), wanted).items()}
