"""Experts that read the context of their tokens."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from core import ExpertConfig, Experts, MoEConfig, RoutingContext, Rows, SoftSlots, TokenChoice


class Scaled(Experts):
    """Experts that scale a token by 1 plus its domain, and add its token id."""

    reads_context = True

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts

    def compute_rows(self, rows: Rows) -> Rows:
        domain_R, id_R = rows.of_context("domain_ids_B"), rows.of_context("token_ids_BS")
        return rows.with_output(rows.x * (1 + domain_R)[:, None] + id_R[:, None])


@dataclass(frozen=True)
class ScaledConfig(ExpertConfig):
    def build(self, num_experts: int, dim: int, out_dim: int | None = None) -> Scaled:
        return Scaled(num_experts)

    def num_params(self, dim: int, out_dim: int | None = None) -> int:
        return 0

    def flops_per_row(self, dim: int, out_dim: int | None = None) -> int:
        return 0


def test_each_row_has_the_facts_of_its_token():
    layer = MoEConfig(3, TokenChoice(top_k=2), ScaledConfig()).build(2)
    x = torch.ones(2, 2, 2)
    context = RoutingContext(token_ids_BS=torch.tensor([[10, 20], [30, 40]]), domain_ids_B=torch.tensor([0, 4]))
    # Gates sum to 1: domain 0 leaves the token as it is, domain 4 takes it five times; its id is added.
    assert layer(x, context)[..., 0].tolist() == [[11.0, 21.0], [35.0, 45.0]]
    with pytest.raises(ValueError, match=r"the experts need context.domain_ids_B, which is None"):
        layer(x)


def test_a_layer_that_hands_no_context_on_is_refused():
    context = RoutingContext(token_ids_BS=torch.tensor([[1, 2]]), domain_ids_B=torch.tensor([0]))
    for config in (
        MoEConfig(3, SoftSlots(2), ScaledConfig()),
        MoEConfig(3, num_shared_experts=1, expert=ScaledConfig()),
    ):
        with pytest.raises(ValueError, match="reads the context of each token, which this layer does not hand on"):
            config.build(2)(torch.ones(1, 2, 2), context)
