"""The errors of transformers, each beside the right value. A version that has mended one skips its test."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from beside import load
from hugging import GATES, B, D, E, F, S, T, config_of, modeling, ours_TE, pair_of_gates, randomize, skip_if_mended
from hugging_blocks import BLOCKS, moe

from apps.hub.transformers_internals import masks_of_documents
from core import FFN, MoEConfig, RoutingContext, TokenChoice
from core.routing.selection import Capacity

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def nllb_blocks(**options: Any) -> tuple[Any, Any]:
    """Return an ``NllbMoeSparseMLP``, and our layer with its weights."""
    given = {**GATES["nllb"].options, "moe_token_dropout": 0.0, "moe_eval_capacity_token_fraction": 1.0, **options}
    block = randomize(modeling("nllb_moe").NllbMoeSparseMLP(config_of("NllbMoeConfig", **given), F), std=0.3).eval()
    experts = [block.experts[f"expert_{e}"] for e in range(E)]
    layer = moe(GATES["nllb"].ours, expert=FFN(F, "relu", bias=True)).build(D).eval()
    weights = {"router.gate.weight": block.router.classifier.weight}
    for ours, theirs in (("in", "fc1"), ("out", "fc2")):
        weights[f"experts.w_{ours}"] = torch.stack([getattr(e, theirs).weight.mT for e in experts])
        weights[f"experts.b_{ours}"] = torch.stack([getattr(e, theirs).bias for e in experts])
    load(layer, weights)
    return block, layer


def fed(block: Any, layer: Any, x: torch.Tensor, most: int = 2) -> torch.Tensor:
    """Return what their experts compute where they are given ids of experts, (T, D)."""
    routing = layer.router(x)
    ids_TK, gates_TK = (t.view(T, 2)[:, :most] for t in (routing.expert_ids_N, routing.gates_N))
    return block.experts(x.view(T, D), ids_TK, gates_TK)


@torch.no_grad()
def test_nllb_runs_only_experts_0_and_1():
    # NllbMoeSparseMLP hands the one-hot of the first choice on as if it were expert ids, and NllbMoeExperts makes a
    # one-hot of it again: its ids are 0 and 1, so experts 2 to 7 never run, and the weight of expert j's column goes to
    # expert 1 where j was chosen first and to expert 0 elsewhere.
    (peer, layer), x = nllb_blocks(), torch.randn(B, S, D)
    first_TE, gates_TE, _ = peer.router(x.view(T, D))
    outputs_ETD = torch.stack([peer.experts[f"expert_{e}"](x.view(T, D)) for e in range(E)])
    right = torch.einsum("te,etd->td", gates_TE, outputs_ETD).view(B, S, D)
    torch.testing.assert_close(layer(x), right, **CLOSE)
    torch.testing.assert_close(fed(peer, layer, x).view(B, S, D), right, **CLOSE)

    theirs = peer(x)
    skip_if_mended(theirs, right, "NLLB-MoE block")
    to_one_T1 = (gates_TE * first_TE).sum(-1, keepdim=True)
    to_zero_T1 = (gates_TE * (1 - first_TE)).sum(-1, keepdim=True)
    wrong = to_zero_T1 * outputs_ETD[0] + to_one_T1 * outputs_ETD[1]
    torch.testing.assert_close(theirs.view(T, D), wrong, **CLOSE)


@torch.no_grad()
def test_nllb_token_dropout_shrinks_the_output_in_evaluation():
    # nn.Dropout(p) keeps the mean in training, and evaluation multiplies by 1 - p besides: 0.8 of what was trained.
    (peer, layer), x = nllb_blocks(moe_token_dropout=0.2), torch.randn(B, S, D)
    theirs = fed(peer, layer, x).view(B, S, D)
    skip_if_mended(theirs, layer(x), "NLLB-MoE token dropout")
    torch.testing.assert_close(theirs, 0.8 * layer(x), **CLOSE)
    # Which is right for weights that were trained on unscaled masks: gates times 1 - p.
    router = replace(GATES["nllb"].ours, scale=0.8)
    masked = moe(router, expert=FFN(F, "relu", bias=True), expert_output_masking=0.2).build(D).eval()
    masked.load_state_dict(layer.state_dict())
    torch.testing.assert_close(theirs, masked(x), **CLOSE)


@torch.no_grad()
def test_nllb_token_dropout_drops_elements_and_not_outputs_of_pairs():
    # The masking of the paper leaves a pair's output out as a whole. One expert a token, so that nothing hides it.
    (peer, layer), x = nllb_blocks(moe_token_dropout=0.5), torch.randn(B, S, D)
    zeros_T = (fed(peer.train(), layer, x, most=1) == 0).sum(-1)
    if set(zeros_T.tolist()) <= {0, D}:
        pytest.skip("NLLB-MoE token dropout: mended")
    assert ((zeros_T > 0) & (zeros_T < D)).any()


@torch.no_grad()
def test_nllb_an_evaluation_changes_the_capacity_of_training():
    # 40 tokens, 8 experts, factor 1: an expert takes 2 * 40 / 8 = 10 pairs in training. The peer keeps its last
    # capacity in the module: after an evaluation of 8 tokens at a fraction of 1, training goes on with 8.
    gate = GATES["nllb"]
    options = {"expert_capacity": 10, "moe_eval_capacity_token_fraction": 1.0}
    peer, router = pair_of_gates(gate, Capacity(1.0, eval_factor=4.0), **options)
    x, other = torch.randn(1, 40, D), torch.randn(1, 8, D)
    x[..., 0] += 3.0  # so that some experts are full

    ours = ours_TE(router.train()(x))
    router.eval()(other)
    assert torch.equal(ours_TE(router.train()(x)), ours)
    assert int((ours > 0).sum(0).max()) == 10

    torch.testing.assert_close(gate.dense(peer.train()(x[0])), ours)
    peer.eval()(other[0])
    theirs = gate.dense(peer.train()(x[0]))
    skip_if_mended(theirs, ours, "NLLB-MoE capacity after an evaluation")
    assert int((theirs > 0).sum(0).max()) == 8


def test_nllb_random_second_is_not_normalized(monkeypatch):
    # Scores 0.5, 0.3, 0.2: gates 0.5 / 0.8 and 0.3 / 0.8. Under "random" the peer replaces the second by its score, so
    # a token's gates sum to 0.925. The draws are zeros: the second always stays.
    monkeypatch.setattr(torch, "rand_like", torch.zeros_like)
    options = {"second_expert_policy": "random", "normalize_router_prob_before_dropping": True}
    config = config_of("NllbMoeConfig", d_model=3, num_experts=3, **options)
    peer = modeling("nllb_moe").NllbMoeTop2Router(config).train()
    router = TokenChoice(top_k=2, second_expert_policy="random").build(3, 3).train()
    peer.classifier.weight.data.copy_(torch.eye(3))
    router.gate.weight.data.copy_(torch.eye(3))
    x = torch.tensor([[0.5, 0.3, 0.2]]).log()
    ours = ours_TE(router(x[None]), 3)
    assert ours[0].tolist() == pytest.approx([0.625, 0.375, 0.0])
    theirs = peer(x)[1]
    skip_if_mended(theirs, ours, "NLLB-MoE random second expert")
    assert theirs[0].tolist() == pytest.approx([0.625, 0.3, 0.0])


def test_nllb_ignores_padding_only_when_told_not_to():
    # router_ignore_padding_tokens=True routes the padding; False leaves it out. Ours never routes it.
    gate, x = GATES["nllb"], torch.randn(1, 6, D)
    valid = torch.tensor([[True] * 4 + [False] * 2])
    peer, router = pair_of_gates(gate, router_ignore_padding_tokens=True)
    ours = ours_TE(router(x, RoutingContext(valid_BS=valid)))
    assert (ours > 0).sum(-1).tolist() == [2, 2, 2, 2, 0, 0]
    theirs = gate.dense(peer(x[0], (~valid).flatten().long()))
    skip_if_mended(theirs, ours, "NLLB-MoE router_ignore_padding_tokens")
    assert (theirs > 0).sum(-1).tolist() == [2] * 6


@pytest.mark.parametrize("name", ["mixtral", "switch"])
def test_their_jitter_overwrites_the_tokens_and_reaches_the_experts(name):
    # Switch (arXiv 2101.03961) jitters what the router sees. The peers multiply in place, so that the experts and the
    # caller's tensor are jittered as well; ours leaves both alone.
    case = BLOCKS[name]
    config = config_of(case.config, **{**case.options, "router_jitter_noise": 0.5})
    peer = randomize(getattr(modeling(case.model), case.block)(config), std=0.3).train()
    layer = MoEConfig(E, TokenChoice(case.ours.router.top_k, jitter_eps=0.5), case.ours.expert).build(D).train()
    x = torch.randn(B, S, D)
    ours_x, their_x = x.clone(), x.clone()
    with torch.no_grad():
        layer(ours_x), peer(their_x)
    assert torch.equal(ours_x, x)
    skip_if_mended(their_x, x, f"{name}: jitter")
    ratio = their_x / x
    assert 0.5 <= ratio.min() < 0.6
    assert 1.4 < ratio.max() <= 1.5


def test_phimoe_jitters_its_input_twice():
    # Once in the block and once in its router, both in place: the factors of 0.5 to 1.5 become 0.25 to 2.25.
    peer, _ = BLOCKS["phimoe"].pair(input_jitter_noise=0.5)
    x = torch.randn(B, S, D)
    their_x = x.clone()
    with torch.no_grad():
        peer.train()(their_x)
    skip_if_mended(their_x, x, "PhiMoE: jitter")
    ratio = their_x / x
    if 0.5 <= ratio.min() and ratio.max() <= 1.5:
        pytest.skip("PhiMoE: jitters once")
    assert 0.25 <= ratio.min() < 0.4
    assert 1.8 < ratio.max() <= 2.25


@torch.no_grad()
def test_longcat_flash_adds_no_router_bias():
    # router_bias=True makes a bias, and the forward multiplies by the weight alone.
    peer, layer = BLOCKS["longcat-flash"].pair(router_bias=True)
    biased = MoEConfig(layer.num_experts, replace(BLOCKS["longcat-flash"].ours.router, gate_bias=True)).build(D).router
    biased.gate.weight.copy_(peer.router.classifier.weight)
    biased.gate.bias.copy_(peer.router.classifier.bias)
    biased.expert_bias.copy_(layer.router.expert_bias)
    x = torch.randn(B, S, D)
    theirs_TE = GATES["mixtral"].dense(peer.router(x), layer.num_experts)
    skip_if_mended(theirs_TE, ours_TE(biased(x), layer.num_experts), "LongCat-Flash router bias")
    torch.testing.assert_close(theirs_TE, ours_TE(layer.router(x), layer.num_experts))


def test_deepseek_v2_does_not_heed_norm_topk_prob():
    # The published code divides by the sum where the config says so (no released model does); the peer never does.
    gate = GATES["deepseek-v2-lite"]
    peer, _ = pair_of_gates(gate, norm_topk_prob=True)
    x = torch.randn(1, 20, D)
    router = TokenChoice(top_k=3).build(D, E)
    router.gate.weight.data.copy_(peer.weight)
    ours, theirs = ours_TE(router(x)), gate.dense(peer(x[0]))
    torch.testing.assert_close(ours.sum(-1), torch.ones(20))
    skip_if_mended(theirs, ours, "DeepSeek-V2 norm_topk_prob")
    assert (theirs.sum(-1) < 0.99).any()
    torch.testing.assert_close(theirs / theirs.sum(-1, keepdim=True), ours)


@torch.no_grad()
def test_gpt_oss_lets_documents_of_a_row_see_each_other():
    # Other models read from position_ids where a document begins; eager attention of this one makes its mask without.
    kind, sizes = modeling("gpt_oss").GptOssForCausalLM, {"vocab_size": 50, "num_hidden_layers": 1}
    peer = randomize(kind(config_of("GptOssConfig", **GATES["gpt-oss"].options, **sizes)), std=0.3).eval()
    ids_1S = torch.randint(50, (1, 9))
    places_1S = torch.tensor([[*range(4), *range(5)]])
    packed = peer(input_ids=ids_1S, position_ids=places_1S, use_cache=False).logits[:, 4:]
    alone = peer(input_ids=ids_1S[:, 4:], use_cache=False).logits
    skip_if_mended(packed, alone, "GPT-OSS: masks of packed rows")
    given = {"attention_mask": masks_of_documents(peer, ids_1S, places_1S), "use_cache": False}
    torch.testing.assert_close(peer(input_ids=ids_1S, position_ids=places_1S, **given).logits[:, 4:], alone)
