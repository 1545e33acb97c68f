"""transformers' gates beside ours (5.24 seen): the same experts with the same weights, the same gradients."""

from __future__ import annotations

import pytest
import torch
from beside import tensor_of
from hugging import GATES, B, D, E, S, T, config_of, modeling, ours_TE, pair_of_gates, randomize

from core import RoutingContext, SparseMixer, TokenChoice
from core.routing.selection import Capacity


@pytest.mark.parametrize("name", GATES)
def test_gates_choose_the_same_experts_with_the_same_weights_and_gradients(name):
    gate = GATES[name]
    peer, router = pair_of_gates(gate)
    x = torch.randn(B, S, D, requires_grad=True)
    routing = router(x)
    tokens = x if gate.model == "switch_transformers" else x.flatten(0, 1)
    theirs_TE, ours = gate.dense(peer(tokens)), ours_TE(routing)
    assert torch.equal(ours > 0, theirs_TE > 0)
    assert (ours > 0).sum(-1).eq(gate.ours.top_k).all()
    torch.testing.assert_close(ours, theirs_TE)

    weights_TE = torch.randn(T, E)
    leaves = [n for n, t in router.named_parameters() if t.requires_grad]
    got = torch.autograd.grad((ours * weights_TE).sum(), [x, *(tensor_of(router, n) for n in leaves)])
    wanted = torch.autograd.grad(
        (theirs_TE * weights_TE).sum(), [x, *(tensor_of(peer, gate.parameters[n]) for n in leaves)]
    )
    for ours_grad, their_grad in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours_grad, their_grad, rtol=1e-5, atol=1e-5)


def test_the_group_limits_of_deepseek_v2_and_v3_differ():
    # What the two settings above are for: judged by the sum of two, some tokens go to other groups.
    peer, router = pair_of_gates(GATES["deepseek-v2"])
    x = torch.randn(1, 200, D)
    top2 = TokenChoice(top_k=3, normalize=False, num_groups=4, limited_groups=2, scale=2.0).build(D, E)
    top2.gate.weight.data.copy_(router.gate.weight)
    theirs_TE = GATES["deepseek-v2"].dense(peer(x[0]))
    assert not torch.equal(ours_TE(top2(x)) > 0, theirs_TE > 0)
    assert torch.equal(ours_TE(router(x)) > 0, theirs_TE > 0)


@pytest.mark.parametrize("capacity", [1, 2, 3])
def test_switch_drops_the_same_tokens_of_each_sequence(capacity):
    # Theirs is a number of tokens a sequence; ours ceil(factor * S / E) = ceil(capacity).
    limit = Capacity(capacity * E / S, group="sequence")
    peer, router = pair_of_gates(GATES["switch"], limit, expert_capacity=capacity)
    x = torch.randn(B, S, D)
    theirs_TE = GATES["switch"].dense(peer(x))
    assert (theirs_TE > 0).sum() < T
    torch.testing.assert_close(ours_TE(router(x)), theirs_TE)


@pytest.mark.parametrize("name", ["nllb", "nllb-kept"])
@pytest.mark.parametrize("priority", ["position", "score"])
def test_nllb_drops_the_same_pairs_by_position_and_by_score(name, priority):
    # Capacity 2 * ceil(T / E) is a factor of 1 where E divides T; 4 is then a factor of 0.4 of T = 40 and K = 2.
    gate, x = GATES[name], torch.randn(1, 40, D)
    peer, router = pair_of_gates(
        gate,
        Capacity(0.4, priority=priority),
        expert_capacity=4,
        batch_prioritized_routing=priority == "score",
        moe_eval_capacity_token_fraction=-1.0,
    )
    theirs_TE = gate.dense(peer(x[0]))
    assert (theirs_TE > 0).sum() < 80
    torch.testing.assert_close(ours_TE(router(x)), theirs_TE)
    whole_T = (theirs_TE > 0).any(-1)
    is_one_T = torch.isclose(theirs_TE.sum(-1)[whole_T], torch.ones(()))
    assert is_one_T.all() if name == "nllb-kept" else not is_one_T.all()


def test_nllb_routes_no_padding():
    gate, x = GATES["nllb"], torch.randn(B, S, D)
    peer, router = pair_of_gates(gate, router_ignore_padding_tokens=False)
    valid = torch.arange(S) < torch.tensor([S, 5, 9])[:, None]
    theirs_TE = gate.dense(peer(x.flatten(0, 1), (~valid).flatten().long()))
    torch.testing.assert_close(ours_TE(router(x, RoutingContext(valid_BS=valid))), theirs_TE)


@pytest.mark.parametrize("draw", [0.5, 0.9])
def test_sparse_mixer_draws_the_experts_of_phimoe_with_its_gates_and_gradients(draw, monkeypatch):
    # In training an expert is drawn by Gumbel noise of the same random state. One that is not the best counts whole
    # where the peer draws more than 0.75 and we less than 0.25, else by a third, which the peer writes 0.3333.
    config = config_of("PhimoeConfig", hidden_size=D, num_local_experts=E, router_jitter_noise=0.3)
    peer = randomize(modeling("phimoe").PhimoeTopKRouter(config)).train()
    router = SparseMixer(jitter_eps=0.3).build(D, E).train()
    router.gate.weight.data.copy_(peer.weight)
    x_TD = torch.randn(500, D)

    monkeypatch.setattr(torch, "rand_like", lambda like: torch.full_like(like, 1 - draw))
    torch.manual_seed(1)
    routing = router(x_TD[None])
    monkeypatch.setattr(torch, "rand_like", lambda like: torch.full_like(like, draw))
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda drawn: drawn)
    torch.manual_seed(1)
    _, their_gates_TK, their_ids_TK = peer(x_TD)
    assert torch.equal(routing.expert_ids_N.view(-1, 2), their_ids_TK)
    assert (their_ids_TK[:, 0] != peer.eval()(x_TD)[2][:, 0]).sum() > 100
    torch.testing.assert_close(routing.gates_N.view(-1, 2), their_gates_TK, rtol=2e-4, atol=0)

    weights_TK = torch.randn(500, 2)
    got = torch.autograd.grad((routing.gates_N.view(-1, 2) * weights_TK).sum(), router.gate.weight)
    wanted = torch.autograd.grad((their_gates_TK * weights_TK).sum(), peer.weight)
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
