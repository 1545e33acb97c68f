"""Routers that see the experts as groups, on typed logits: the gate's weight is the identity where it can be."""

import pytest
import torch
from routed import built, gates, ids, logits_of, terms_of

from core import FFN, MoEConfig, RoutingContext, TokenChoice
from core.routing.pairs.groups import Ensemble, Hierarchical, Prototypes
from core.routing.router import PairRouter
from core.routing.selection import Capacity

# Prototypes: M6-T


def test_each_prototype_gives_its_best_expert_with_its_own_softmax_in_the_order_of_the_tokens():
    # In the groups 0.6 / 0.8, 0.2 / 0.8 and 0.05 / 0.2, 0.15 / 0.2.
    routing = built(Prototypes(2), 4)(logits_of((0.6, 0.2, 0.05, 0.15)))
    assert (ids(routing), gates(routing)) == ([[0, 3]], [pytest.approx([0.75, 0.75])])
    assert routing.evidence.scores_TE[0].tolist() == pytest.approx([0.375, 0.125, 0.125, 0.375])
    # Shares of the pairs 1/2, 0, 0, 1/2: 4 * (0.375 / 2 + 0.375 / 2) = 1.5.
    assert terms_of(routing, "load_balancing_loss")["load_balancing_loss"] == pytest.approx(1.5)
    even = built(Prototypes(2), 4)(logits_of((0.4, 0.1, 0.4, 0.1), (0.1, 0.4, 0.1, 0.4)))
    assert terms_of(even, "load_balancing_loss")["load_balancing_loss"] == pytest.approx(1.0)
    # ceil(0.5 * 2 * 2 / 4) = 1 an expert. Token 0 comes first in both groups, though expert 0 is its weaker choice and
    # the stronger one of token 1.
    rows = ((0.3, 0.2, 0.05, 0.45), (0.45, 0.05, 0.2, 0.3))
    routing = built(Prototypes(2), 4, limit=Capacity(0.5))(logits_of(*rows))
    assert ids(routing) == [[0, 3], [4, 4]]


@pytest.mark.parametrize(
    ("one", "plain"),
    [(Prototypes(1), TokenChoice(1)), (Hierarchical(1, top_groups=1, top_k=2), TokenChoice(2))],
    ids=["prototype", "group"],
)
def test_one_prototype_and_one_group_are_token_choice(one, plain):
    x = torch.randn(2, 9, 6)
    actual, expected = built(one, 6)(x), built(plain, 6)(x)
    assert torch.equal(actual.expert_ids_N, expected.expert_ids_N)
    torch.testing.assert_close(actual.gates_N, expected.gates_N)
    torch.testing.assert_close(actual.evidence.scores_TE, expected.evidence.scores_TE)


# Hierarchical: Shazeer et al., appendix B


def hierarchical(**options) -> PairRouter:
    """Two groups of two experts; the input is the groups' logits and the experts' logits."""
    router = Hierarchical(**{"num_groups": 2, **options}).build(6, 4).eval()
    router.group_gate.weight.data.copy_(torch.eye(6)[:2])
    router.gate.weight.data.copy_(torch.eye(6)[2:])
    return router


# Softmax of the groups 0.7 and 0.3, within them 0.75, 0.25 and 0.2, 0.8.
TWO_LEVELS = torch.tensor([[[0.7, 0.3, 0.75, 0.25, 0.2, 0.8]]]).log()


@pytest.mark.parametrize(
    "top_groups, top_k, expected_ids, expected_gates",
    [
        (1, 1, [0], [0.7 * 0.75]),
        (2, 1, [0, 3], [0.7 * 0.75, 0.3 * 0.8]),
        (1, 2, [0, 1], [0.7 * 0.75, 0.7 * 0.25]),
        (2, 2, [0, 3, 1, 2], [0.525, 0.24, 0.175, 0.06]),
    ],
)
def test_gates_are_the_groups_times_the_experts(top_groups, top_k, expected_ids, expected_gates):
    routing = hierarchical(top_groups=top_groups, top_k=top_k)(TWO_LEVELS)
    assert (ids(routing), gates(routing)) == ([expected_ids], [pytest.approx(expected_gates)])
    assert routing.evidence.scores_TE[0].tolist() == pytest.approx([0.525, 0.175, 0.06, 0.24])


def test_several_choices_of_a_level_share_its_gate_and_groups_not_chosen_get_no_gradient():
    router = Hierarchical(3, top_groups=2, top_k=2).build(12, 9).eval()
    router.group_gate.weight.data.copy_(torch.eye(12)[:3])
    router.gate.weight.data.copy_(torch.eye(12)[3:])
    groups, within = (0.5, 0.1, 0.4), (0.2, 0.5, 0.3)
    routing = router(torch.tensor([[[*groups, *within, *within, *within]]]).log())
    # Groups 0 and 2 with 0.5 / 0.9 and 0.4 / 0.9; experts 1 and 2 of each with 0.5 / 0.8 and 0.3 / 0.8.
    # Products 0.347222, 0.208333, 0.277778, 0.166667.
    assert ids(routing) == [[1, 7, 2, 8]]
    assert gates(routing) == [pytest.approx([0.347222, 0.277778, 0.208333, 0.166667], abs=1e-6)]
    router = hierarchical(top_groups=1, top_k=2)
    router(TWO_LEVELS).gates_N[0].backward()
    assert router.gate.weight.grad[:2].abs().amin(1).min() > 0
    assert router.gate.weight.grad[2:].abs().max() == 0
    assert router.group_gate.weight.grad.abs().amin(1).min() > 0


# Ensemble: E3


def test_a_sequence_sees_the_experts_of_its_member_alone_with_padding_too():
    x = logits_of((0.4, 0.2, 0.3, 0.1)).expand(3, 2, 4)
    routing = built(Ensemble(2, top_k=1), 4)(x)
    # Sequences 0 and 2: 0.4 / 0.6 of expert 0; sequence 1: 0.3 / 0.4 of expert 2.
    assert ids(routing) == [[0], [0], [2], [2], [0], [0]]
    assert routing.gates_N[::2].tolist() == pytest.approx([0.666667, 0.75, 0.666667], abs=1e-6)
    assert routing.evidence.scores_TE[0].tolist() == pytest.approx([0.666667, 0.333333, 0, 0], abs=1e-6)
    assert routing.evidence.scores_TE[2].tolist() == pytest.approx([0, 0, 0.75, 0.25])
    x = torch.randn(4, 3, 4)
    valid = torch.tensor([[True, True, True], [False, False, False], [True, False, True], [True, True, False]])
    router = built(Ensemble(2), 4)
    full, padded = router(x), router(x, RoutingContext(valid_BS=valid))
    assert torch.equal(padded.expert_ids_N, full.expert_ids_N.masked_fill(~valid.flatten(), 4))


def test_the_z_loss_is_over_the_members_own_logits_and_the_balance_loss_1_at_balance():
    # log(0.6)^2 = 0.260943 and log(0.4)^2 = 0.839589: mean 0.550266.
    routing = built(Ensemble(2), 4)(logits_of((0.4, 0.2, 0.3, 0.1)).expand(2, 1, 4))
    assert terms_of(routing, "router_z_loss")["router_z_loss"] == pytest.approx(0.550266, abs=1e-6)
    x = logits_of((0.4, 0.1, 0.1, 0.4), (0.1, 0.4, 0.4, 0.1)).expand(2, 2, 4)
    assert terms_of(built(Ensemble(2), 4)(x), "load_balancing_loss")["load_balancing_loss"] == pytest.approx(1.0)


def test_repeated_inputs_give_what_the_members_give_alone():
    layer, x = MoEConfig(6, Ensemble(3, top_k=2), FFN(8)).build(8), torch.randn(2, 5, 8)
    y = layer(x.repeat_interleave(3, 0)).unflatten(0, (2, 3))
    for member in range(3):
        alone = MoEConfig(2, TokenChoice(2), FFN(8)).build(8)
        own = slice(2 * member, 2 * member + 2)
        with torch.no_grad():
            alone.router.gate.weight.copy_(layer.router.gate.weight[own])
            alone.experts.w_in.copy_(layer.experts.w_in[own])
            alone.experts.w_out.copy_(layer.experts.w_out[own])
        torch.testing.assert_close(y[:, member], alone(x))
