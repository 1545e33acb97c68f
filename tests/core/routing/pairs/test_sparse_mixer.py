"""SparseMixer on typed logits: the gate's weight is the identity."""

import math

import pytest
import torch
from routed import built, gates, ids

from core.routing.pairs.sparse_mixer import SparseMixer

# Close to 2.0 up to 2 * 0.1: (2 - 1.8) / 2 = 0.1 is, (2 - 1.0) / 2 = 0.5 is not. Then 1.8 alone: 1.0 is 0.44 away.
X = torch.tensor([[[2.0, 1.8, 1.0, -1.0]]])


def test_each_gate_is_the_softmax_over_the_experts_close_to_the_best():
    routing = built(SparseMixer(0.1), 4)(X)
    assert (ids(routing), gates(routing)) == ([[0, 1]], [pytest.approx([1 / (1 + math.exp(-0.2)), 1.0])])
    # With 2 * 0.3 expert 2 is close to both: softmax of 2, 1.8, 1; then of 1.8 and 1.
    wide, total = built(SparseMixer(0.3), 4)(X), math.exp(2) + math.exp(1.8) + math.e
    assert gates(wide) == [pytest.approx([math.exp(2) / total, 1 / (1 + math.exp(-0.8))])]
    # Best -1.0 of (-1.0, -1.1): 0.1 / 1.1 = 0.09, close. (0, 0): equal, both close.
    routing = built(SparseMixer(0.05), 2)(torch.tensor([[[-1.0, -1.1], [0.0, 0.0]]]))
    assert ids(routing) == [[0, 1], [0, 1]]
    assert gates(routing) == [pytest.approx([1 / (1 + math.exp(-0.1)), 1.0]), [0.5, 1.0]]


def test_training_draws_by_the_softmax_and_thirds_the_gates_of_others_than_the_best():
    torch.manual_seed(0)
    router = built(SparseMixer(0.1), 4, training=True)
    routing = router(X.expand(1, 10_000, 4))
    first, gate = torch.tensor(ids(routing))[:, 0], torch.tensor(gates(routing))[:, 0]
    p = 1 / (1 + math.exp(0.2))  # of expert 1: 0.450; 4 sigma of 10000 draws is 0.02
    assert (set(first.tolist()), (first == 1).float().mean().item()) == ({0, 1}, pytest.approx(p, abs=0.02))
    assert torch.allclose(gate[first == 0], torch.tensor(1 - p))
    whole = torch.isclose(gate[first == 1], torch.tensor(p))
    assert whole.float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert torch.allclose(gate[first == 1][~whole], torch.tensor(p / 3))


def test_a_gate_that_counts_by_a_third_has_the_gradient_of_the_whole():
    torch.manual_seed(0)
    x = X.expand(1, 200, 4).clone().requires_grad_()
    routing = built(SparseMixer(0.1), 4, training=True)(x)
    routing.gates_N[::2].sum().backward()
    # p (1 - p) for the drawn one of the two, minus it for the other, whichever was drawn and however it counts.
    slope, drawn = math.exp(0.2) / (1 + math.exp(0.2)) ** 2, torch.tensor(ids(routing))[:, 0]
    expected = torch.where(drawn == 0, slope, -slope)
    assert torch.allclose(x.grad[0, :, 0], expected)
    assert torch.allclose(x.grad[0, :, 1], -expected)
    assert x.grad[0, :, 2:].abs().max() == 0
