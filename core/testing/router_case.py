"""``RouterCase``: the router, layers and tokens of the checks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from ..config import MoEConfig
from ..contract import RoutingContext
from ..experts import FFN
from ..layers import MoE
from ..routing.balance.balance import Balance
from ..routing.balance.terms import TERMS
from ..routing.router import RouterConfig

HIDDEN = 12
IDS = 5
"""Number of token ids, tasks, domains and modalities where the config has no field for it."""
FIELDS = ("token_ids_BS", "task_ids_B", "domain_ids_B", "modality_BS")
SIZES = {
    "token_ids_BS": "vocab_size",
    "task_ids_B": "num_tasks",
    "domain_ids_B": "num_domains",
    "modality_BS": "num_modalities",
}


@dataclass(frozen=True)
class RouterCase:
    """A router to be checked, with the sizes and the seed of its layers and tokens."""

    router: RouterConfig
    num_experts: int
    dim: int
    seed: int

    @property
    def is_pairs(self) -> bool:
        return self.router.layer_kind == "pairs"

    def has(self, option: str) -> bool:
        """Return whether a field of ``MoEConfig`` has a meaning."""
        return option in self.router.layer_options

    def config(self, **options: Any) -> MoEConfig:
        return MoEConfig(self.num_experts, self.router, FFN(HIDDEN, bias=True), **options)

    def full_config(self) -> MoEConfig:
        """Return the config of the check of a new layer: with a shared expert next to the routed ones."""
        return self.config(num_shared_experts=1)

    def layer(self, *, training: bool = False, **options: Any) -> MoE:
        """Return a layer with each router weight moved from its initial value, which may be 0 or equal for all."""
        with seeded(self.seed):
            layer = self.config(**options).build(self.dim)
            with torch.no_grad():
                for parameter in layer.router.parameters():
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
                if layer.router.expert_bias is not None:
                    layer.router.expert_bias.normal_(std=0.05)
        return layer.train(training)

    def tokens(self, B: int = 3, S: int = 6, offset: int = 0) -> Tensor:
        """Return tokens, (B, S, D); another ``offset`` gives other tokens."""
        return torch.randn(B, S, self.dim, generator=torch.Generator().manual_seed(self.seed + 100 + offset))

    def context(self, B: int = 3, S: int = 6, offset: int = 0, valid_BS: Tensor | None = None) -> RoutingContext:
        """Return a context with all fields, in the ranges that the config's fields give."""
        generator = torch.Generator().manual_seed(self.seed + 200 + offset)
        values: dict[str, Tensor] = {}
        for name in FIELDS:
            size = getattr(self.router, SIZES[name], IDS)
            values[name] = torch.randint(size, (B, S) if name.endswith("BS") else (B,), generator=generator)
        return RoutingContext(valid_BS=valid_BS, **values)

    def padded(self) -> tuple[Tensor, RoutingContext]:
        """Return a batch of a full sequence, one with two places of padding, and one of only padding."""
        valid_BS = torch.tensor([[True] * 6, [True] * 4 + [False] * 2, [False] * 6])
        return self.tokens(), self.context(valid_BS=valid_BS)

    def balance(self) -> Balance:
        """Return weights of 1 for every term that applies."""
        weights: dict[str, Any] = {name: float(name in self.router.terms) for name in TERMS}
        types = getattr(self.router, "num_tasks", IDS)
        return Balance(**weights, expert_types=tuple((types - 1 - e) % types for e in range(self.num_experts)))


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Start the CPU's global generator from ``seed`` inside the block, and put it back after it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def with_padding_holding(x: Tensor, context: RoutingContext, value: float, ids: int) -> tuple[Tensor, RoutingContext]:
    """Return the tokens and their context with padding that holds ``value`` and ``ids``."""
    assert context.valid_BS is not None
    empty_B = ~context.valid_BS.any(1)
    changed: dict[str, Any] = {}
    for name in FIELDS:
        old = getattr(context, name)
        changed[name] = old.masked_fill(~context.valid_BS if name.endswith("BS") else empty_B, ids)
    return x.masked_fill(~context.valid_BS[..., None], value), replace(context, **changed)


def take(context: RoutingContext, sequences: Any, places: Any = slice(None)) -> RoutingContext:
    """Return the context of some sequences and places."""
    values = {f.name: getattr(context, f.name) for f in fields(context)}
    return RoutingContext(
        **{
            name: None if v is None else v[sequences][:, places] if name.endswith("BS") else v[sequences]
            for name, v in values.items()
        }
    )
