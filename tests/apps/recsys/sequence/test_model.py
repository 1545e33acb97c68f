"""The history transformer: what each position may see, what padding may not change, and what all of it costs."""

import dataclasses
import math

import pytest
import torch
from refusals import refused
from torch.testing import assert_close

import core
from apps.nets.attention import self_mask
from apps.nets.packing import Packing
from apps.recsys.sequence.model import CausalConvolution, HistoryModel, HistoryModelConfig, TokenMixing, dense_gates

MOE = core.MoEConfig(num_experts=4, router=core.TokenChoice(top_k=2), expert=core.FFN(hidden_dim=12))
SMALL = {"dim": 8, "depth": 2, "num_heads": 2, "hidden_dim": 16}
ITEMS = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 0, 0], [7, 0, 0, 0, 0]])


def build(mixing="mixture", moe=MOE, dtype=torch.float64, seed=0, num_items=9, max_length=8, **config):
    torch.manual_seed(seed)
    config = HistoryModelConfig(**{**SMALL, "mixing": mixing, **config})
    model = HistoryModel(config, num_items=num_items, max_length=max_length, ffn=moe)
    with torch.no_grad():  # as it starts, positions are faint
        model.pos_embed.weight.normal_(std=0.5)
        model.item_embed.weight[1:].normal_(std=0.5)
    return model.to(dtype).eval()


KINDS = pytest.mark.parametrize(
    ("mixing", "moe"),
    [("attention", None), ("mixture", None), ("mixture", MOE), ("hstu", None), ("hstu", MOE)],
    ids=["sasrec", "mixture", "moe", "hstu", "hstu_moe"],
)


@KINDS
def test_a_position_sees_what_is_before_it_and_no_padding(mixing, moe):
    # A later item changes no earlier output.
    model = build(mixing, moe)
    with torch.no_grad():
        before, _, _ = model.encode(torch.tensor([[3, 1, 4, 1, 5], [2, 7, 1, 8, 2]]))
        after, _, _ = model.encode(torch.tensor([[3, 1, 4, 9, 6], [2, 7, 1, 8, 3]]))
    assert_close(after[[0, 1, 2, 5, 6, 7, 8]], before[[0, 1, 2, 5, 6, 7, 8]], rtol=0, atol=1e-12)
    assert ((after - before)[[3, 4, 9]].abs().amax(-1) > 1e-3).all()
    # An earlier one does change the later outputs.
    model = build(mixing, moe)
    with torch.no_grad():
        before, after = (model.encode(torch.tensor([[i, 1, 4, 1, 5]]))[0] for i in (3, 8))
    assert ((after - before).abs().amax(-1) > 1e-6).all()
    # Padding changes nothing.
    model = build(mixing, moe)
    alone = [[3, 1, 4, 1, 5], [9, 2, 6], [7]]
    left = torch.tensor([[0, 0, 3, 1, 4, 1, 5], [0, 0, 0, 0, 9, 2, 6], [0, 0, 0, 0, 0, 0, 7]])
    amid = torch.tensor([[3, 0, 1, 4, 0, 1, 5], [0, 9, 0, 2, 0, 6, 0], [0, 0, 7, 0, 0, 0, 0]])
    with torch.no_grad():
        expected = torch.cat([model(torch.tensor([row])) for row in alone])
        for items in (ITEMS, left, amid):
            assert_close(model(items), expected, rtol=0, atol=1e-12)
    # Padding has no gradient.
    model = build(mixing, moe).train()
    h_TD, _, _ = model.encode(ITEMS)
    model.scores(h_TD)[:, 1:].logsumexp(-1).sum().backward()
    assert not model.item_embed.weight.grad[0].any()
    assert model.item_embed.weight.grad[1:].abs().amax(-1).min() > 0
    assert model.pos_embed.weight.grad[:5].abs().amax(-1).min() > 0
    assert not model.pos_embed.weight.grad[5:].any()


SECONDS = torch.tensor([[0, 0, 9, 70, 9000], [3, 4, 5, 0, 0], [8, 0, 0, 0, 0]])
TIMED = pytest.mark.parametrize("mixing", ["attention", "mixture", "hstu"])


def timed(mixing):
    model = build(mixing, None, time_buckets=32)
    with torch.no_grad():  # as it starts, times say nothing
        model.pair_bias.time_bias.normal_()
        model.pair_bias.distance_bias.normal_()
    return model


@TIMED
def test_the_time_between_items_counts_and_that_of_later_ones_and_of_padding_does_not(mixing):
    model = timed(mixing)
    with torch.no_grad():
        scores = model(ITEMS, SECONDS)
        assert_close(model(ITEMS, SECONDS + 1_764_000_001), scores, rtol=0, atol=1e-12)
        later = SECONDS.clone()
        later[0, 4] += 10**6  # the last item of the first history
        changed = (model(ITEMS, later) - scores)[:, 1:].abs().amax(-1)
        assert_close(model(ITEMS), model(ITEMS, torch.full_like(SECONDS, 7)), rtol=0, atol=1e-12)
    assert changed[0] > 1e-4
    assert not changed[1:].any()
    model = timed(mixing)
    places = torch.tensor([[0, 2, 3, 5, 6], [1, 3, 5, 0, 0], [2, 0, 0, 0, 0]])
    items, seconds = torch.zeros(3, 7, dtype=torch.int64), torch.full((3, 7), 12345)
    for row, length in enumerate((5, 3, 1)):
        items[row, places[row, :length]], seconds[row, places[row, :length]] = (
            ITEMS[row, :length],
            SECONDS[row, :length],
        )
    with torch.no_grad():
        h_TD = model.encode(ITEMS, SECONDS)[0]
        assert_close(model.encode(items, seconds)[0], h_TD, rtol=0, atol=1e-12)
        later = SECONDS.clone()
        later[0, 3:] += 10**6
        assert_close(model.encode(ITEMS, later)[0][[0, 1, 2, 5, 6, 7, 8]], h_TD[[0, 1, 2, 5, 6, 7, 8]])


@pytest.mark.parametrize("mixing", ["attention", "hstu"])
def test_a_model_is_its_layers_and_hstu_has_no_ffn_but_that_of_moe_blocks(mixing):
    torch.manual_seed(0)
    config = HistoryModelConfig(**{**SMALL, "mixing": mixing, "hidden_dim": None, "distance_bias": True})
    model = HistoryModel(config, num_items=9, max_length=8, ffn=MOE, moe_blocks=[1]).double().eval()
    with torch.no_grad():
        model.pair_bias.distance_bias.normal_()
        x_BLD = model.item_embed(ITEMS[:1]) * math.sqrt(8) + model.pos_embed.weight[:5]
        mask = model.pair_bias.mask(x_BLD, None)
        for block in model.blocks:
            x_BLD = x_BLD + block.mixing(block.mixing_norm(x_BLD), mask)
            if block.ffn is not None:
                own = (core.RoutingContext(),) if block is model.blocks[1] else ()
                x_BLD = x_BLD + block.ffn(block.ffn_norm(x_BLD), *own)
        assert_close(model.encode(ITEMS[:1])[0], model.norm(x_BLD)[0], rtol=0, atol=1e-12)
    assert (model.blocks[0].ffn is None) == (mixing == "hstu")
    dense = HistoryModel(HistoryModelConfig(**SMALL, mixing="hstu"), num_items=9, max_length=8)
    assert [block.ffn.w_in.out_features for block in dense.blocks] == [16, 16]  # a hidden_dim asks for it


def test_convolution_by_hand():
    # One channel, kernel 3 with weights 1, 10, 100 on the item, the one before and the one before that. Two histories
    # of 3 and 2: the second one must not see the first one's end.
    conv = CausalConvolution(1, 3).double()
    with torch.no_grad():
        conv.proj.weight.copy_(torch.tensor([[1.0, 10.0, 100.0]]))
        conv.proj.bias.fill_(0.5)
        packing, _ = Packing.of(torch.tensor([[True, True, True], [True, True, False]]))
        output = conv(torch.tensor([[1.0], [2.0], [3.0], [4.0], [5.0]], dtype=torch.float64), packing=packing)
    # 1; 2 + 10; 3 + 20 + 100; 4; 5 + 40; plus the bias. GELU(z) is z * Phi(z).
    z = torch.tensor([1.5, 12.5, 123.5, 4.5, 45.5], dtype=torch.float64)
    assert_close(output.squeeze(1), z * torch.special.ndtr(z), rtol=0, atol=1e-12)


def test_the_mixture_is_the_gated_sum_of_its_experts_and_the_gates_sums_are_the_load():
    torch.manual_seed(0)
    layer = TokenMixing(HistoryModelConfig(**SMALL)).double().eval()
    x_TD = torch.randn(9, 8, dtype=torch.float64)
    packing, _ = Packing.of(ITEMS > 0)
    with torch.no_grad():
        # A softmax over two is a sigmoid of the difference: AdaMCT's gate.
        g_T1 = torch.sigmoid(x_TD @ (layer.router.gate.weight[0] - layer.router.gate.weight[1]))[:, None]
        mask = self_mask(x_TD.new_empty(3, 5, 0), 2, valid_BL=None, causal=True, relative_HLL=None)
        local = layer.norms["convolution"](layer.experts["convolution"](x_TD, packing=packing))
        far = layer.norms["attention"](layer.experts["attention"](x_TD, mask, packing=packing))
        assert_close(layer(x_TD, mask, packing=packing), layer.out(g_T1 * local + (1 - g_T1) * far), rtol=0, atol=1e-12)
    model = build()
    with torch.no_grad(), core.record(model) as tape:
        model(ITEMS)
    assert [e.name for e in tape.entries] == ["blocks.0.mixing", "blocks.0.ffn", "blocks.1.mixing", "blocks.1.ffn"]
    for entry in tape.entries[::2]:
        gates_TE = entry.routing.evidence.scores_TE
        assert gates_TE.shape == (9, 2)
        assert_close(gates_TE.sum(-1), torch.ones(9, dtype=gates_TE.dtype))
        assert entry.routing.expert_names == ("convolution", "attention")
    stats = core.RoutingStats.from_tape(tape).layers
    load_E = tape.entries[0].routing.evidence.scores_TE.sum(0)
    assert stats["blocks.0.mixing"].load_imbalance == pytest.approx(float(load_E.max() / 4.5))
    assert int(stats["blocks.0.ffn"].num_tokens) == 9
    assert int(stats["blocks.0.ffn"].tokens_per_expert.sum()) == 18  # two experts for each real item, none for padding


def test_a_router_takes_convolution_or_attention_and_others_see_the_items_as_token_ids():
    router = core.TokenChoice(top_k=1, normalize=False)
    model = build(mixing_router=router, mixing_balance=core.Balance(load_balancing_loss=0.1))
    with core.record(model.train()) as tape:
        model(ITEMS)
    routing = tape.entries[0].routing
    gates_TE = dense_gates(routing, 2)
    assert (gates_TE > 0).sum(-1).tolist() == [1] * 9
    assert_close(gates_TE.amax(-1), routing.evidence.scores_TE.amax(-1))
    assert int(routing.chosen_per_expert_E.sum()) == 9
    assert float(core.aux_losses(tape).terms["load_balancing_loss"]) > 0
    # Items 1 to 9 by hash: the expert is a function of the item alone.
    moe = core.MoEConfig(num_experts=4, router=core.Hash(vocab_size=10), expert=core.FFN(hidden_dim=12))
    model = build(moe=moe)
    with torch.no_grad(), core.record(model) as tape:
        model(ITEMS)
    routing = tape.entries[1].routing
    of_token = dict(zip(routing.token_index_N.tolist(), routing.expert_ids_N.tolist(), strict=True))
    assert of_token[1] == of_token[3]  # both are item 1
    assert [of_token[t] for t in (8, 9, 11, 14)] == [4] * 4  # padding: no expert


def test_the_gate_learns_and_a_mixture_is_counted_as_active():
    model = build().train()
    with core.record(model) as tape:
        model(ITEMS)[:, 1:].logsumexp(-1).sum().backward()
    assert len(tape) == 4
    for block in model.blocks:
        assert block.mixing.router.gate.weight.grad.abs().max() > 0
        assert block.ffn.router.gate.weight.grad.abs().max() > 0
    model = build(moe=None)
    assert core.active_params(model) == sum(p.numel() for p in model.parameters())


def numel(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(("mixing", "extra"), [("attention", 0), ("mixture", 248), ("hstu", 88)])
def test_parameters_by_hand(mixing, extra):
    # Embeddings 10 * 8 items, 8 * 8 positions; final norm 16. A block: norms 32, qkv 8 * 24 + 24 = 216, out 72,
    # FFN 2 * 8 * 16 + 16 + 8 = 280: 600. The mixture adds 3 * 64 + 8 of the convolution, 32 of norms, 16 of the gate;
    # HSTU 8 * 8 + 8 of u and 16 of a norm, and in all 8 * 2 biases by distance.
    model = build(mixing, None)
    assert numel(model) == 80 + 64 + 16 + 2 * (600 + extra) + (16 if mixing == "hstu" else 0)
    assert model.config.extra_params() == extra
    more = build(mixing, None, time_buckets=5, distance_bias=True)
    assert numel(more.pair_bias) == 8 * 2 + 5 * 2


@pytest.mark.parametrize(("mixing", "extra"), [("attention", 0), ("mixture", 384 + 32), ("hstu", 128)])
def test_flops_by_hand(mixing, extra):
    # 9 real items. Of each: qkv 2 * 8 * 24 = 384, out 128, FFN 2 * 2 * 8 * 16 = 512; the mixture 3 * 128 of the
    # convolution and 2 * 8 * 2 = 32 of the gate, HSTU's u 2 * 8 * 8 = 128. Attention is over 3 padded rows of 5:
    # 2 * 2 * 3 * 5 * 5 * 8 = 2,400. The scores are of the 3 last items: 3 * 2 * 8 * 9 = 432.
    model = build(mixing, None, dtype=torch.float32)
    per_item = 384 + 128 + 512 + extra
    assert model.config.extra_flops_per_token() == extra
    with torch.no_grad():
        assert core.count_flops(model, ITEMS) == 2 * (9 * per_item + 2400) + 432


def test_experts_start_like_dense_ffns_and_their_flops_are_of_real_items():
    # Each MoE layer: 9 real items in 15 places. The gate is computed for all, 15 * 2 * 8 * 4 = 960; two experts for the
    # real ones, 9 * 2 * 4 * 8 * 12 = 6,912.
    model = build("mixture", MOE, dtype=torch.float32)
    calls = []
    model.blocks[0].ffn.register_forward_pre_hook(lambda m, a: calls.append(a))
    with torch.no_grad():
        model(ITEMS)
        assert core.count_flops(model.blocks[0].ffn, *calls[0]) == 960 + 6912
    # Xavier-uniform of (D, F) = (8, 12): bound sqrt(6 / 20) = 0.548, also of each expert by itself.
    model = build(dtype=torch.float32)
    shared = build(moe=dataclasses.replace(MOE, num_shared_experts=1), dtype=torch.float32).blocks[0].ffn.shared_experts
    for weight in (*model.blocks[0].ffn.experts.parameters(), *shared.parameters()):
        assert 0.5 < float(weight.detach().abs().max()) <= math.sqrt(6 / 20)


def test_histories_and_models_are_checked_and_attention_dropout_is_of_training_alone():
    model = build(dtype=torch.float32)
    refused(r"item id 10 is not in 0 to num_items=9", lambda: model(torch.tensor([[1, 10]])))
    refused(r"item id -1 is not in 0 to num_items=9", lambda: model(torch.tensor([[1, -1]])))
    refused(r"a history of 9 items is longer than max_length=8", lambda: model(torch.ones(2, 9, dtype=torch.int64)))
    refused(r"items are torch.float32 of shape \(1, 2\), not integers \(B, S\)", lambda: model(torch.ones(1, 2)))
    refused(r"of shape \(2,\), not integers", lambda: model(torch.ones(2, dtype=torch.int64)))
    with pytest.raises(ValueError, match=r"times of shape \(2, 2\) are not of the items \(1, 2\)"):
        model(torch.ones(1, 2).long(), torch.ones(2, 2).long())
    assert model(torch.tensor([[0] * 5 + [1] * 8])).shape == (1, 10)  # padding does not count
    config = HistoryModelConfig(**SMALL)
    refused(r"num_items=0 must be at least 1", lambda: HistoryModel(config, num_items=0, max_length=4))
    refused(r"max_length=0 must be at least 1", lambda: HistoryModel(config, num_items=3, max_length=0))
    acausal = core.MoEConfig(num_experts=4, router=core.ExpertChoice())
    with pytest.raises(ValueError, match=r"ExpertChoice.* lets later tokens change earlier ones"):
        HistoryModel(config, num_items=3, max_length=4, ffn=acausal)
    model = build("attention", None, attn_dropout=0.5, dropout=0.0, embed_dropout=0.0)
    with torch.no_grad():
        assert torch.equal(model(ITEMS), model(ITEMS))
        model.train()
        assert not torch.equal(model(ITEMS), model(ITEMS))


@KINDS
def test_an_empty_history_scores_all_items_alike(mixing, moe):
    model = build(mixing, moe, dtype=torch.float32)
    for items in (torch.zeros(2, 3, dtype=torch.int64), torch.tensor([[0, 0], [4, 5]]), torch.zeros(1, 0).long()):
        with torch.no_grad():
            scores = model(items)
        assert scores.shape == (len(items), 10)
        assert not scores[0, 1:].any()
        assert scores[:, 1:].isfinite().all()
        assert (scores[:, 0] == -math.inf).all()
    with torch.no_grad():
        assert model(torch.zeros(0, 3, dtype=torch.int64)).shape == (0, 10)


def test_scores_are_float32_under_autocast_and_int32_items_are_taken():
    model = build(dtype=torch.float32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        scores, h = model(ITEMS), model.encode(ITEMS)[0]
    assert scores.dtype == torch.float32
    with torch.no_grad():
        assert_close(scores[:, 1:], h[[4, 7, 8]].float() @ model.item_embed.weight[1:].t())
    model = build(dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(model(ITEMS.int()), model(ITEMS))
    model = build("hstu", None)
    with torch.no_grad():
        assert torch.equal(model(ITEMS, SECONDS), model(ITEMS))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"dim": 9}, r"dim=9 is not divisible by num_heads=2"),
     ({"mixing_router": core.ExpertChoice()}, r"router ExpertChoice.* lets later tokens change earlier ones"),
     ({"mixing_router": core.TokenChoice(top_k=3)}, r"top_k=3 exceeds num_experts=2"),
     ({"mixing_router": core.Hash(vocab_size=8)}, r"router Hash.* needs context.token_ids_BS, which the mixing"),
     ({"mixing_balance": core.Balance(load=0.1)}, r"balance.load=0.1 does not apply to Dense")],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)  # fmt: skip
def test_configs_are_checked(options, message):
    refused(message, lambda: HistoryModelConfig(**{**SMALL, **options}))
