"""A layer of a user's own is recorded, balanced and counted as those of the tree."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import core


class Weighted(core.MoELayer):
    """Every expert computes every token, and the chosen ones are summed by their gates."""

    def __init__(self, dim: int, num_experts: int) -> None:
        super().__init__(core.Balance(load_balancing_loss=1.0, router_z_loss=0.0), dim)
        self.router = core.TokenChoice(top_k=1, expert_bias=True, bias_update_rate=0.5).build(dim, num_experts)
        self.experts = core.FFN(hidden_dim=4).build(num_experts, dim)

    def forward(self, x: Tensor) -> Tensor:
        routing = self.router(x[None])
        self.record_pass(routing)
        gates_TE = torch.zeros(len(x), 2).index_put((routing.token_index_N, routing.expert_ids_N), routing.gates_N)
        return (gates_TE[:, :, None] * self.experts(x, "each")).sum(1)


def test_a_layer_of_ones_own_is_on_the_tape_in_the_losses_and_in_the_statistics():
    model = nn.Sequential(Weighted(2, 2))
    with torch.no_grad():
        model[0].router.gate.weight.copy_(torch.eye(2))
    x = torch.tensor([[3.0, 0.0], [3.0, 0.0], [3.0, 0.0], [0.0, 3.0]])
    model(x)  # nobody listens
    with core.record(model) as tape:
        assert model[0].is_recorded
        model(x)
    assert not model[0].is_recorded
    assert [entry.name for entry in tape.entries] == ["0"]
    # Softmax of (3, 0): 0.952574 and 0.047426. Shares of the pairs 3/4 and 1/4; mean scores 0.726287 and 0.273713.
    # 2 * (3/4 * 0.726287 + 1/4 * 0.273713) = 1.226287
    loss = core.aux_loss(tape)
    assert loss.item() == pytest.approx(1.226287, abs=1e-6)
    loss.backward()
    assert model[0].router.gate.weight.grad.abs().max() > 0
    core.update_expert_bias(model, tape)
    assert model[0].router.expert_bias.tolist() == [-0.5, 0.5]  # loads 3 and 1, their mean 2
    assert core.RoutingStats.from_tape(tape).layers["0"].load_imbalance == 1.5
