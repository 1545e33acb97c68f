"""transformers' gates, blocks and balance losses beside ours (5.24 seen): the same experts, outputs and gradients."""

from __future__ import annotations

import pytest
import torch
from beside import check_same, tensor_of
from hugging import GATES, B, D, E, S, T, config_of, modeling, ours_TE, pair_of_gates, randomize, skip_if_mended
from hugging_blocks import BLOCKS, VOCAB
from torch import nn

from core import FFN, Balance, Hash, MoEConfig, RoutingContext, SparseMixer, TokenChoice, aux_losses, record
from core.routing.selection import Capacity

VALID = torch.arange(S) < torch.tensor([S, 5, 9])[:, None]


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_give_the_same_output_and_gradients(name):
    case = BLOCKS[name]
    peer, layer = case.pair()
    asked, context = (), RoutingContext()
    if isinstance(case.ours.router, Hash):
        ids_BS = torch.randint(VOCAB, (B, S))
        peer.gate.tid2eid.copy_(torch.rand(VOCAB, E).topk(3).indices)
        layer.router.table.copy_(peer.gate.tid2eid)
        asked, context = (ids_BS,), RoutingContext(token_ids_BS=ids_BS)

    def theirs(x_BSD):
        y = peer(x_BSD, *asked)
        return (y[0] if isinstance(y, tuple) else y).view(B, S, D)

    x = torch.randn(B, S, D)
    check_same(layer, peer, case.layout, x, lambda x: layer(x, context), theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", GATES)
def test_gates_choose_the_same_experts_with_the_same_weights_and_gradients(name):
    gate = GATES[name]
    peer, router = pair_of_gates(gate)
    x = torch.randn(B, S, D, requires_grad=True)
    tokens = x if gate.model == "switch_transformers" else x.flatten(0, 1)
    theirs_TE, ours = gate.dense(peer(tokens)), ours_TE(router(x))
    assert torch.equal(ours > 0, theirs_TE > 0)
    assert (ours > 0).sum(-1).eq(gate.ours.top_k).all()
    torch.testing.assert_close(ours, theirs_TE)

    weights_TE = torch.randn(T, E)
    leaves = [n for n, t in router.named_parameters() if t.requires_grad]
    got = torch.autograd.grad((ours * weights_TE).sum(), [x, *(tensor_of(router, n) for n in leaves)])
    their_leaves = [tensor_of(peer, gate.parameters[n]) for n in leaves]
    wanted = torch.autograd.grad((theirs_TE * weights_TE).sum(), [x, *their_leaves])
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("capacity", [1, 3])
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
    gate, x, limit = GATES[name], torch.randn(1, 40, D), Capacity(0.4, priority=priority)
    options = {"expert_capacity": 4, "moe_eval_capacity_token_fraction": -1.0}
    peer, router = pair_of_gates(gate, limit, batch_prioritized_routing=priority == "score", **options)
    theirs_TE = gate.dense(peer(x[0]))
    assert (theirs_TE > 0).sum() < 80
    torch.testing.assert_close(ours_TE(router(x)), theirs_TE)
    whole_T = (theirs_TE > 0).any(-1)
    is_one_T = torch.isclose(theirs_TE.sum(-1)[whole_T], torch.ones(()))
    assert is_one_T.all() if name == "nllb-kept" else not is_one_T.all()


def test_nllb_routes_no_padding():
    gate, x = GATES["nllb"], torch.randn(B, S, D)
    peer, router = pair_of_gates(gate, router_ignore_padding_tokens=False)
    theirs_TE = gate.dense(peer(x.flatten(0, 1), (~VALID).flatten().long()))
    torch.testing.assert_close(ours_TE(router(x, RoutingContext(valid_BS=VALID))), theirs_TE)


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


def loss_terms(router, x, balance, valid=None):
    """Return the unweighted terms of one pass, and its logits."""
    layer = MoEConfig(E, router, FFN(1), balance=balance).build(D)
    nn.init.normal_(layer.router.gate.weight)
    with record(layer) as tape:
        layer(x, None if valid is None else RoutingContext(valid_BS=valid))
    return aux_losses(tape).terms, tape.entries[0].routing.evidence.logits_TE


@pytest.mark.parametrize(("top_k", "valid"), [(2, None), (4, VALID)])
@pytest.mark.parametrize("model", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss", "nllb_moe"])
def test_their_load_balancing_loss_is_top_k_times_ours(model, top_k, valid):
    # sum over e of (pairs of e / tokens) P_e * E; ours divides by the pairs, K times as many, and is 1 at balance.
    terms, logits_TE = loss_terms(TokenChoice(top_k=top_k), torch.randn(B, S, D), Balance(), valid)
    mask = None if valid is None else valid.long()
    theirs = modeling(model).load_balancing_loss_func((logits_TE,), E, top_k, mask)
    assert terms["load_balancing_loss"] != 1
    torch.testing.assert_close(theirs, top_k * terms["load_balancing_loss"])


def test_their_load_balancing_loss_pools_the_layers_and_misses_a_collapse():
    # Two layers of two experts: the first sends all to expert 0, the second all to expert 1. Scores are 0.9 and 0.1.
    # Pooled: f = (1/2, 1/2), P = (1/2, 1/2), so 2 * (1/4 + 1/4) = 1, perfect balance, with gradients that cancel.
    # Ours, layer by layer: 2 * (1 * 0.9 + 0 * 0.1) = 1.8 in each.
    first_TE = torch.tensor([[0.9, 0.1]]).log().expand(10, 2)
    theirs = modeling("mixtral").load_balancing_loss_func((first_TE, first_TE.flip(1)), 2, 1)
    ours = []
    for logits_TE in (first_TE, first_TE.flip(1)):
        layer = MoEConfig(2, TokenChoice(top_k=1), FFN(1)).build(2)
        layer.router.gate.weight.data.copy_(torch.eye(2))
        with record(layer) as tape:
            layer(logits_TE)
        ours.append(aux_losses(tape).terms["load_balancing_loss"].item())
    assert ours == pytest.approx([1.8, 1.8])
    skip_if_mended(theirs, torch.tensor(1.8), "loss of several layers")
    assert theirs.item() == pytest.approx(1.0)


def test_switch_losses():
    module, x = modeling("switch_transformers"), torch.randn(B, S, D)
    terms, logits_TE = loss_terms(TokenChoice(top_k=1), x, Balance(sequence_balance=1e-4))
    logits_BSE = logits_TE.view(B, S, E)
    torch.testing.assert_close(module.router_z_loss_func(logits_BSE), terms["router_z_loss"])
    # Theirs is a mean over sequences: of the batch it is our load_balancing_loss, by sequence our sequence_balance.
    scores_BSE, best_BS = logits_BSE.softmax(-1), logits_BSE.argmax(-1)
    whole = module.load_balancing_loss_func(scores_BSE.view(1, T, E), best_BS.view(1, T))
    by_sequence = module.load_balancing_loss_func(scores_BSE, best_BS)
    torch.testing.assert_close(whole, terms["load_balancing_loss"])
    torch.testing.assert_close(by_sequence, terms["sequence_balance"])
    assert by_sequence != whole
