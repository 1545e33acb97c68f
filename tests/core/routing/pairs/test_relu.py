"""ReLU routing on typed logits: the gate's weight is the identity."""

import pytest
import torch
from layered import identity_gate
from routed import built, gates, ids, recorded

from core import FFN, MoEConfig, RoutingContext, Tape, aux_losses, update_expert_bias
from core.routing.balance.losses import sparsity_loss
from core.routing.pairs.relu import ReLURouting, next_l1_weight

# Two tokens, three experts. Positive: 0 and 2; 0.
X = torch.tensor([[[0.5, -1.0, 1.5], [1.0, -0.5, -2.0]]])


def layer_of(training: bool = True, **options) -> object:
    config = MoEConfig(3, ReLURouting(**{"top_k": 1, "l1_start": 0.5, **options}), FFN(4))
    return identity_gate(config.build(3)).train(training)


def test_a_token_takes_the_experts_of_its_positive_logits_at_their_value():
    routing = built(ReLURouting(1), 3)(X)
    assert (ids(routing), gates(routing)) == ([[2, 0, 3], [0, 3, 3]], [[1.5, 0.5, 0.0], [1.0, 0.0, 0.0]])
    assert routing.tokens_per_expert_E.tolist() == [2, 0, 1]
    bounded = built(ReLURouting(1, max_k=1), 3)(X)
    assert (ids(bounded), gates(bounded)) == ([[2], [0]], [[1.5], [1.0]])
    layer, x = layer_of(), torch.tensor([[[-1.0, -2.0, -0.5]]], requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.abs().max() == 0
    assert x.grad.abs().max() == 0
    # The output is continuous where an expert enters.
    layer.eval()
    below, above = (layer(torch.tensor([[[1.0, logit, -1.0]]])) for logit in (-1e-6, 1e-6))
    assert torch.allclose(below, above, atol=1e-5)


def test_the_loss_by_hand_and_its_gradient():
    # K = 1. f = 2/2, 0, 1/2; means of relu / K: 1.5/2, 0, 1.5/2. 3 * (0.75 + 0.375) = 3.375.
    assert sparsity_loss(torch.tensor([1.5, 0, 1.5]), torch.tensor([2.0, 0, 1]), 2).item() == pytest.approx(3.375)
    layer, x = layer_of(), X.clone().requires_grad_()
    tape = recorded(layer, x)
    losses = aux_losses(tape)
    assert (losses.terms["sparsity"].item(), losses.total.item()) == (pytest.approx(3.375), pytest.approx(0.5 * 3.375))
    # 0.5 * 3 * f_e / 2 where the logit is positive: 0.75 for expert 0, 0.375 for expert 2.
    (grad,) = torch.autograd.grad(losses.total, x)
    assert grad.flatten().tolist() == pytest.approx([0.75, 0, 0.375, 0.75, 0, 0])
    assert losses.terms.keys() == {"sparsity"}
    # Padding is in neither loss nor counts.
    padded = torch.cat((X, torch.full((1, 2, 3), torch.nan)), 1)
    tape = recorded(layer, padded, RoutingContext(valid_BS=torch.tensor([[True, True, False, False]])))
    assert aux_losses(tape).terms["sparsity"].item() == pytest.approx(3.375)
    assert tape.entries[0].routing.evidence.counts.tolist() == [3, 6]


def test_the_weight_rises_while_tokens_take_more_than_their_mean_and_falls_below_it():
    weight = torch.tensor(0.5)
    assert next_l1_weight(weight, torch.tensor(0.5), 1 / 3, 1.2).item() == pytest.approx(0.6)
    assert next_l1_weight(weight, torch.tensor(0.2), 1 / 3, 1.2).item() == pytest.approx(0.5 / 1.2)
    assert next_l1_weight(weight, torch.tensor(0.25), 0.25, 1.2).item() == 0.5
    assert next_l1_weight(torch.tensor(9999.0), torch.tensor(1.0), 0.25, 1.2).item() == pytest.approx(1e4)


@pytest.mark.parametrize("loads", [False, True])
def test_a_step_moves_the_weight_by_the_counts_of_all_its_passes(loads):
    layer, steps = layer_of(), Tape()
    assert set(layer.state_dict()) >= {"router.l1_weight"}
    for x in (X, -X):  # 3 of 6 positive, then 3 of 6: a half, and the target is a third
        tape = recorded(layer, x)
        steps = steps.merge(tape.loads() if loads else tape.detach())
    update_expert_bias(layer, steps)
    assert layer.router.l1_weight.item() == pytest.approx(0.6)
    update_expert_bias(layer, Tape())  # no pass, no step
    update_expert_bias(layer.eval(), steps)
    assert layer.router.l1_weight.item() == pytest.approx(0.6)
    layer.to(torch.float16)
    assert layer.router.l1_weight.dtype == torch.float32
    layer.router.reset_parameters()
    assert layer.router.l1_weight.item() == 0.5


def test_without_a_bias_half_of_the_logits_of_symmetric_tokens_are_positive():
    x = torch.randn(1, 200, 16)
    biased, plain = (MoEConfig(8, ReLURouting(2, gate_bias=bias), FFN(8)).build(16).router for bias in (True, False))
    biased.gate.bias.data.fill_(-9.0)
    assert biased(x).tokens_per_expert_E.sum() == 0
    # A token and its opposite: each expert takes one of the two.
    assert plain(torch.cat((x, -x), 1)).tokens_per_expert_E.tolist() == [200] * 8


def test_dense_training_trains_two_gates_and_evaluates_the_sparse_one():
    torch.manual_seed(0)
    config = ReLURouting(1, max_k=1, dense_training=True, gate_bias=False)
    router = built(config, 3, training=True)
    router.dense_gate.weight.data.copy_(torch.ones(3, 3))
    # The logits of the dense gate are the token's sum, 1, for every expert; the sparse gate's are the token.
    routing = router(X[:, :1].expand(1, 1000, 3))
    dense = [row for row in ids(routing) if row == [0, 1, 2]]
    assert len(dense) / 1000 == pytest.approx(0.5, abs=0.064)  # 4 sigma
    assert all(row == [2, 0, 3] for row in ids(routing) if row != [0, 1, 2])
    # The counts and the loss are those of the sparse gate, 2 of 3 positive.
    assert (routing.evidence.counts.tolist(), routing.evidence.scores_TE[0].tolist()) == ([2000, 3000], [0.5, 0, 1.5])
    assert ids(router.eval()(X)) == [[2], [0]]
    assert config.num_params(3, 3) == 18
