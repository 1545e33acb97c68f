"""The translation model and the language model."""

import copy
import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import core
from apps.data.subwords import PAD_ID
from apps.equal_cost import routers
from apps.nets import transformer
from apps.nets.config import TransformerConfig
from apps.nets.transformer import LanguageModel, TranslationModel

VOCAB = 20
SOURCE = torch.tensor([[5, 6, 7, 3, 0], [8, 9, 10, 11, 3], [4, 3, 0, 0, 0]])
TARGET = torch.tensor([[2, 5, 6, 7], [2, 9, 9, 4], [2, 4, 0, 0]])
POSITIONS = ("sinusoidal", "learned", "rotary", "relative", "none")
MOE = core.MoEConfig(4, core.TokenChoice(top_k=2), core.FFN(hidden_dim=12, activation="relu"))


def config(**options):
    small = {"dim": 16, "hidden_dim": 24, "relative_buckets": 8, "relative_max_distance": 16}
    return TransformerConfig("nano", **{**small, **options})


def build(moe=None, layers=("every2", "every2"), target_vocab=None, ffn=None, **options):
    torch.manual_seed(0)
    return (
        TranslationModel(
            config(**options),
            source_vocab=VOCAB,
            target_vocab=target_vocab,
            ffn=ffn or moe,
            encoder_moe_blocks=layers[0],
            decoder_moe_blocks=layers[1],
        )
        .double()
        .eval()
    )


def language_model(moe=None, layers="all", **options):
    torch.manual_seed(0)
    return LanguageModel(config(**options), vocab=VOCAB, ffn=moe, moe_blocks=layers).double().eval()


# ---- decoding


@pytest.mark.parametrize("moe", [None, MOE], ids=["dense", "sparse"])
@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize("positions", POSITIONS)
def test_steps_equal_the_whole_sequence(positions, norm, moe, monkeypatch):
    monkeypatch.setattr(transformer, "SLOTS", 1)
    model = build(moe, positions=positions, norm=norm)
    logits_BLV = model(SOURCE, TARGET)
    cache = model.start(model.encode(SOURCE)).expand(2)
    for t in range(TARGET.shape[1]):
        logits_RV = model.step(TARGET[:, t].repeat_interleave(2), cache)
        assert_close(logits_RV.view(3, 2, VOCAB), logits_BLV[:, t, None].expand(3, 2, VOCAB))
    language = language_model(moe, positions=positions, norm=norm)
    logits_BLV, cache = language(TARGET), language.start(3)
    for t in range(TARGET.shape[1]):
        assert_close(language.step(TARGET[:, t], cache), logits_BLV[:, t])


def test_steps_equal_the_whole_sequence_where_routers_ask_for_more():
    # The task of a sentence and the ids of tokens reach the routers of encoder, decoder and step.
    task_B = torch.tensor([0, 1, 0])
    for moe in (core.MoEConfig(4, core.Task(num_tasks=2, top_k=1)), core.MoEConfig(4, core.Hash(vocab_size=VOCAB))):
        model = build(moe, layers=("all", "all"))
        logits_BLV, cache = model(SOURCE, TARGET, task_B), model.start(model.encode(SOURCE, task_B)).expand(2)
        for t in range(TARGET.shape[1]):
            logits_RV = model.step(TARGET[:, t].repeat_interleave(2), cache)
            assert_close(logits_RV.view(3, 2, VOCAB)[:, 1], logits_BLV[:, t])
    other_BLV = build(core.MoEConfig(4, core.Task(num_tasks=2, top_k=1)))(SOURCE, TARGET, 1 - task_B)
    assert not torch.allclose(other_BLV[:, 0], logits_BLV[:, 0])


def test_steps_equal_the_whole_sequence_with_every_router_that_a_decoder_accepts():
    ids_B, refused = torch.tensor([0, 1, 0]), {}
    real_BL = TARGET != PAD_ID
    moes = {name: routers.with_router(dataclasses.replace(MOE, num_experts=8), name) for name in routers.overlays()}
    moes["random_average"] = dataclasses.replace(MOE, router=core.Random(evaluation="average"))
    for name, moe in moes.items():
        if not moe.router.is_causal:
            continue
        model = language_model(moe, decoder_layers=1)
        logits_BLV = model(TARGET, ids_B, ids_B)
        assert logits_BLV.isfinite().all(), name  # what cannot decode scores all the same
        try:
            cache = model.start(3, ids_B, ids_B)
        except ValueError as error:
            refused[name] = str(error)
            continue
        for t in range(TARGET.shape[1]):
            assert_close(model.step(TARGET[:, t], cache)[real_BL[:, t]], logits_BLV[:, t][real_BL[:, t]], msg=name)
    assert set(refused) == {"ensemble", "lory", "mixture_of_tokens", "random"}
    assert refused["lory"] == (
        "router Merge(kind='lory') (arXiv 2405.03133) trains and scores, but cannot decode step by step: a token's "
        "experts depend on other tokens; take another router for the decoder"
    )
    # In the encoder they stand where they will.
    model = build(core.MoEConfig(4, core.Random()), ("all", "none"))
    assert len(model.start(model.encode(SOURCE))) == 3
    with pytest.raises(ValueError, match=r"router Random .* a token's experts depend on its place"):
        build(core.MoEConfig(4, core.Random()), ("none", "all")).start(model.encode(SOURCE))


def test_logits_of_a_step_are_float32_whatever_the_weights_are():
    model = build(MOE)
    for dtype, expected in ((torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16,) * 2):
        model.to(dtype)
        cache = model.start(model.encode(SOURCE))
        logits_RV = model.step(TARGET[:, 0], cache)
        assert logits_RV.dtype == (torch.float32 if dtype == torch.bfloat16 else dtype)
        assert cache.store.dtype == cache.memory.dtype == expected
        assert not logits_RV.requires_grad


def test_a_step_heeds_autocast():
    model = build(MOE).float()
    expected = model(SOURCE, TARGET)[:, 0]
    with torch.autocast("cpu", torch.bfloat16):
        cache = model.start(model.encode(SOURCE)).expand(2)
        logits_RV = model.step(TARGET[:, 0].repeat_interleave(2), cache)
    assert cache.store.dtype == torch.bfloat16
    assert_close(logits_RV[::2], expected, atol=0.1, rtol=0.1)


# ---- what a position may see


@pytest.mark.parametrize("moe", [None, MOE], ids=["dense", "sparse"])
@pytest.mark.parametrize("positions", POSITIONS)
def test_a_later_token_changes_no_earlier_one(positions, moe):
    other = TARGET.clone()
    other[:, 2] = torch.tensor([11, 12, 13])
    for model, before, after in (
        (build(moe, positions=positions), (SOURCE, TARGET), (SOURCE, other)),
        (language_model(moe, positions=positions), (TARGET,), (other,)),
    ):
        a, b = model(*before), model(*after)
        assert_close(a[:, :2], b[:, :2])
        assert not torch.allclose(a[:, 2], b[:, 2])


@pytest.mark.parametrize("moe", [None, MOE], ids=["dense", "sparse"])
@pytest.mark.parametrize("positions", POSITIONS)
def test_padding_changes_nothing(positions, moe):
    model = build(moe, positions=positions)
    logits_BLV = model(SOURCE, TARGET)
    real_BL = TARGET != PAD_ID
    # More of it on both sides.
    more = model(F.pad(SOURCE, (0, 3)), F.pad(TARGET, (0, 2)))
    assert_close(more[:, :4][real_BL], logits_BLV[real_BL])
    # Without any: each sentence by itself.
    for b, (source_S, target_L) in enumerate(zip(SOURCE, TARGET, strict=True)):
        source_1S, target_1L = (ids[ids != PAD_ID][None] for ids in (source_S, target_L))
        assert_close(model(source_1S, target_1L)[0], logits_BLV[b, : target_1L.shape[1]])
    # Whatever its embedding is.
    with torch.no_grad():
        model.source_embed.weight[PAD_ID] = 1e3
    model.output = torch.nn.Identity()
    model.output.weight = model.source_embed.weight.detach().clone()
    changed = model(SOURCE, TARGET)
    assert_close(changed[real_BL][:, 1:], logits_BLV[real_BL][:, 1:])


def test_padding_is_not_routed():
    # 4 + 5 + 2 source tokens and 4 + 4 + 2 target tokens, each with two experts.
    model = build(MOE)
    with core.record(model) as tape:
        model(SOURCE, TARGET)
    assert [entry.name for entry in tape.entries] == ["encoder.layers.1.ffn", "decoder.layers.1.ffn"]
    assert [int(entry.routing.tokens_per_expert_E.sum()) for entry in tape.entries] == [22, 20]
    with core.record(model) as tape:
        cache = model.start(model.encode(SOURCE))
        model.step(torch.tensor([4, PAD_ID, 5]), cache)
    assert [int(entry.routing.tokens_per_expert_E.sum()) for entry in tape.entries] == [22, 4]


def test_a_source_of_padding_alone_stays_finite():
    source = torch.tensor([[0, 0], [4, 3]])
    for model in (build(), build(MOE, positions="relative")):
        assert model(source, TARGET[:2]).isfinite().all()


def test_without_positions_a_source_is_a_bag_and_with_them_it_is_not():
    turned = torch.tensor([[7, 6, 5, 3, 0], [11, 10, 9, 8, 3], [4, 3, 0, 0, 0]])
    for positions in POSITIONS:
        model = build(positions=positions)
        same = torch.allclose(model(SOURCE, TARGET), model(turned, TARGET))
        assert same == (positions == "none"), positions


def test_sentences_are_independent_of_their_batch():
    model = build(MOE)
    logits_BLV = model(SOURCE, TARGET)
    order = torch.tensor([2, 0, 1])
    assert_close(model(SOURCE[order], TARGET[order]), logits_BLV[order])
    assert_close(model(SOURCE[:1], TARGET[:1]), logits_BLV[:1])
    assert_close(model(SOURCE, TARGET[:, :1]), logits_BLV[:, :1])
    assert model(SOURCE[:0], TARGET[:0]).shape == (0, 4, VOCAB)


def test_learned_positions_refuse_a_longer_sequence():
    model = build(positions="learned", max_length=4)
    with pytest.raises(ValueError, match="a sequence of 5 tokens is longer than max_length=4"):
        model(SOURCE, TARGET)
    model = build(positions="sinusoidal", max_length=3)
    assert_close(model(SOURCE, TARGET), build(positions="sinusoidal", max_length=9)(SOURCE, TARGET))


# ---- which parts there are


def test_moe_blocks_have_moe_layers():
    options = {"encoder_layers": 4, "decoder_layers": 3}
    for layers, encoder, decoder in (
        (("every2", "every2"), (1, 3), (1,)),
        (("last1", "all"), (3,), (0, 1, 2)),
        (("none", [0, -1]), (), (0, 2)),
        (([2], "none"), (2,), ()),
    ):
        model = build(MOE, layers, **options)
        assert (model.encoder_moe_blocks, model.decoder_moe_blocks) == (encoder, decoder)
        names = [f"encoder.layers.{i}.ffn" for i in encoder] + [f"decoder.layers.{i}.ffn" for i in decoder]
        assert list(core.moe_layers(model)) == names


def test_a_dense_model_is_the_same_class_with_ffns_of_any_width():
    model = build(ffn=core.DenseFFN(40, "relu"), layers=("none", [0]))
    widths = [m.w_in.out_features for m in model.modules() if isinstance(m, core.layers.FeedForward)]
    assert widths == [24, 24, 40, 24]
    assert not core.moe_layers(model)
    # One of one width does not ask which: "every2" of one layer is none.
    assert build(encoder_layers=1, decoder_layers=1).encoder_moe_blocks == ()


@pytest.mark.parametrize("gated", [False, True])
def test_one_expert_is_the_dense_ffn(gated):
    # E = 1 and K = 1: the softmax of one logit is 1.
    expert = core.SwiGLU(hidden_dim=24) if gated else core.FFN(hidden_dim=24, activation="relu", bias=True)
    moe = core.MoEConfig(1, core.TokenChoice(top_k=1, normalize=False), expert)
    options = {"gated": True, "activation": "silu", "bias": False} if gated else {}
    sparse, dense = build(moe, ("all", "all"), **options), build(**options)
    weights = dict(dense.state_dict())
    for name, weight in sparse.state_dict().items():
        if "router" in name:
            continue
        if "experts" in name:
            ours = name.replace(".experts.", ".").replace(".b_in", ".w_in.bias").replace(".b_out", ".w_out.bias")
            ours = ours if ours.endswith("bias") else ours + ".weight"
            weight.copy_(weights.pop(ours).T[None] if weight.ndim == 3 else weights.pop(ours)[None])
        else:
            weight.copy_(weights.pop(name))
    assert not weights
    real_BL = TARGET != PAD_ID  # padding takes no expert
    assert_close(sparse(SOURCE, TARGET)[real_BL], dense(SOURCE, TARGET)[real_BL])


def test_a_dense_gated_ffn_by_hand():
    # x = (1, 1, 1, 1): x w_in = 4 * 0.5, x w_gate = 4 * 0.25, and w_out = 3: silu(1) * 2 * 3.
    ffn = config(dim=4, num_heads=1, hidden_dim=1, gated=True, activation="silu", bias=False).dense_ffn.build(4)
    with torch.no_grad():
        ffn.w_in.weight.fill_(0.5)
        ffn.w_gate.weight.fill_(0.25)
        ffn.w_out.weight.fill_(3.0)
    assert_close(ffn(torch.ones(1, 4)), torch.full((1, 4), 6 / (1 + math.exp(-1))))


@pytest.mark.parametrize(
    ("tie", "target_vocab", "vectors"),
    [
        # Rows of D numbers in embeddings and output: 20 of each vocabulary, or 20 and 30.
        ("all", None, 20),
        ("inputs", None, 40),
        ("decoder", None, 40),
        ("decoder", 30, 50),
        ("none", None, 60),
        ("none", 30, 80),
    ],
)
def test_tied_weights_are_one_parameter(tie, target_vocab, vectors):
    model = build(tie=tie, target_vocab=target_vocab)
    of_vocabularies = [p for p in model.parameters() if p.shape[-1:] == (16,) and p.shape[0] in (VOCAB, 30)]
    assert sum(len(p) for p in of_vocabularies) == vectors
    assert len(model.state_dict()) == len(list(model.parameters()))
    size = target_vocab or VOCAB
    assert model.output_weight.shape == (size, 16)
    assert model.logits(torch.ones(2, 16, dtype=torch.float64)).shape == (2, size)
    is_shared = {"all": True, "decoder": True, "inputs": False, "none": False}[tie]
    assert (model.output_weight is model.target_embedding.weight) == is_shared
    assert (model.source_embed is model.target_embedding) == (tie in ("all", "inputs"))
    model(SOURCE, TARGET).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_scales_of_embeddings_and_logits():
    # Positions and layers apart, an embedding is multiplied by sqrt(16) = 4, and a hidden state by the logits' scale.
    scaled, plain = build(positions="none"), build(positions="none", scale_embeddings=False)
    with torch.no_grad():
        plain.source_embed.weight.mul_(4.0)
    assert_close(scaled.encode(SOURCE).x_BSD, plain.encode(SOURCE).x_BSD)
    model = build(logits_scale=0.25)
    h = torch.randn(3, 16, dtype=torch.float64)
    assert_close(model.logits(h), 0.25 * h @ model.output_weight.t())


def test_the_decoder_may_start_with_the_embedding_of_the_end():
    by_end, plain = build(start="eos"), build()
    with torch.no_grad():
        plain.source_embed.weight[2] = plain.source_embed.weight[3]
    of_others = [i for i in range(VOCAB) if i != 2]  # the output of id 2 is tied to it
    assert_close(by_end(SOURCE, TARGET)[..., of_others], plain(SOURCE, TARGET)[..., of_others])


def test_language_models_of_known_kinds():
    mixtral = language_model(
        core.MoEConfig(8, core.TokenChoice(top_k=2), core.SwiGLU(hidden_dim=12)),
        positions="rotary",
        norm="rms",
        num_kv_heads=1,
        bias=False,
        tie="none",
        scale_embeddings=False,
    )
    assert mixtral.decoder.layers[0].mixing.qkv.weight.shape == ((2 + 1 + 1) * 8, 16)
    assert mixtral.decoder.layers[0].cross_attn is None
    assert not [name for name, _ in mixtral.named_parameters() if "bias" in name]
    router = core.TokenChoice(top_k=2, score_func="sigmoid", expert_bias=True)
    deepseek = language_model(
        core.MoEConfig(8, router, core.SwiGLU(hidden_dim=12), num_shared_experts=1),
        layers=[1, 2],
        decoder_layers=3,
        positions="rotary",
        norm="rms",
        gated=True,
        activation="silu",
        bias=False,
    )
    assert list(core.moe_layers(deepseek)) == ["decoder.layers.1.ffn", "decoder.layers.2.ffn"]
    assert isinstance(deepseek.decoder.layers[0].ffn, core.layers.FeedForward)
    for model in (mixtral, deepseek):
        logits_BLV, cache = model(TARGET), model.start(3)
        for t in range(4):
            assert_close(model.step(TARGET[:, t], cache), logits_BLV[:, t])


# ---- costs


def test_flops_are_those_of_a_hand_count():
    # B=2, S=3, L=4, D=16, F=24, V=20, one layer each; two FLOPs a multiply-add. A token's projections of self-attention
    # are 4 D^2, of cross-attention 2 D^2 and 2 D^2 of each source token; scores and values 2 D for each query and key.
    B, S, L, D, F_, V = 2, 3, 4, 16, 24, 20
    encoder = B * S * (4 * D**2 + 2 * S * D + 2 * D * F_)
    decoder = B * L * (6 * D**2 + 2 * L * D + 2 * S * D + 2 * D * F_) + B * S * 2 * D**2
    by_hand = 2 * (encoder + decoder + B * L * D * V)
    source, target = torch.randint(4, V, (B, S)), torch.randint(4, V, (B, L))
    for options in ({}, {"positions": "relative"}, {"positions": "rotary", "norm": "rms", "bias": False}):
        model = build(encoder_layers=1, decoder_layers=1, **options)
        assert core.count_flops(model, source, target) == by_hand, options  # the relative one by explicit products
        assert core.count_flops(model.float(), source, target) == by_hand
        assert core.count_flops(model.bfloat16(), source, target) == by_hand
    sparse = build(MOE, ("all", "all"), encoder_layers=1, decoder_layers=1)
    of_ffns = 2 * B * (S + L) * 2 * D * F_
    assert core.count_flops(sparse, source, target) == by_hand - of_ffns + B * (S + L) * MOE.flops_per_token(D)


def test_flops_of_a_step_by_hand():
    # The third position of 2 sentences of 5 copies, one layer: keys of all copies are read, and the memory once.
    N, K, S, T, D, F_, V = 2, 5, 3, 3, 16, 24, 20
    model = build(encoder_layers=1, decoder_layers=1)
    source, token_R = torch.randint(4, V, (N, S)), torch.full((N * K,), 4)
    cache = model.start(model.encode(source)).expand(K)
    for _ in range(2):
        model.step(token_R, cache)
    by_hand = 2 * N * K * (6 * D**2 + 2 * T * K * D + 2 * S * D + 2 * D * F_ + D * V)
    assert core.count_flops(model.step, token_R, cache) == by_hand


def test_parameters_by_hand():
    # D=16, F=24, V=20. Attention: 4 (D^2 + D); an FFN: 2 D F + F + D; a norm: 2 D.
    D, F_, V = 16, 24, 20
    attention, ffn, norm = 4 * (D**2 + D), 2 * D * F_ + F_ + D, 2 * D
    encoder_layer, decoder_layer = attention + ffn + 2 * norm, 2 * attention + ffn + 3 * norm
    total = V * D + 2 * encoder_layer + 2 * decoder_layer + 2 * norm
    assert sum(p.numel() for p in build().parameters()) == total
    sparse = build(MOE)
    assert sum(p.numel() for p in sparse.parameters()) == total + 2 * (MOE.num_params(D) - ffn)
    # Two of four experts: half of their parameters are left out.
    assert core.active_params(sparse) == total + 2 * (MOE.active_params(D) - ffn)


def test_initial_weights():
    # Xavier: within sqrt(6 / (fan in + fan out)), and close to it. An expert starts as the dense FFN it stands for.
    moe = core.MoEConfig(4, core.TokenChoice(top_k=1), core.FFN(hidden_dim=256, bias=True), num_shared_experts=1)
    torch.manual_seed(0)
    model = TranslationModel(TransformerConfig("nano", hidden_dim=256), source_vocab=1000, ffn=moe)
    D, bound = 64, math.sqrt(6 / (64 + 256))
    dense, sparse = model.encoder.layers[0].ffn, model.encoder.layers[1].ffn
    for weight in (dense.w_in.weight, sparse.experts.w_in[3], sparse.experts.w_out[0], sparse.shared_experts.w_in[0]):
        assert 0.99 * bound < weight.abs().max() <= bound
    for bias in (dense.w_in.bias, sparse.experts.b_in, sparse.shared_experts.b_out):
        assert not bias.any()
    attention = model.decoder.layers[0].cross_attn
    bound = math.sqrt(3 / (2 * D))  # at 1 / sqrt(2) of sqrt(6 / (D + D)): as one matrix of 3 D x D
    for weight in (
        attention.q.weight,
        *attention.kv.weight.chunk(2),
        *model.encoder.layers[0].mixing.qkv.weight.chunk(3),
    ):
        assert 0.99 * bound < weight.abs().max() <= bound
    assert not model.source_embed.weight[PAD_ID].any()
    assert model.source_embed.weight.std().item() == pytest.approx(D**-0.5, rel=0.02)
    # A router's weights are its own: variance 0.1 / D.
    assert sparse.router.gate.weight.std().item() < 2 * math.sqrt(0.1 / D)


# ---- training


@pytest.mark.slow
def test_a_model_learns_to_copy():
    torch.manual_seed(0)
    model = TranslationModel(config(dropout=0.0), source_vocab=VOCAB, ffn=MOE)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    losses = []
    for _ in range(150):
        words = torch.randint(4, VOCAB, (32, 3))
        source, target = F.pad(words, (0, 1), value=3), F.pad(words, (1, 0), value=2)
        with core.record(model) as tape:
            loss = F.cross_entropy(model(source, target).flatten(0, 1), source.flatten())
        (loss + core.aux_loss(tape)).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    # Guessing one of 16 words at three of four places: 2.1. The end is soon known.
    assert losses[-1] < 0.3 < 2.0 < losses[0]


def test_something_is_dropped_in_training_alone():
    for options in ({"dropout": 0.5}, {"dropout": 0.0, "ffn_dropout": 0.5}, {"dropout": 0.0, "attn_dropout": 0.5}):
        model = build(**{"embed_dropout": 0.0, **options})
        assert torch.equal(model(SOURCE, TARGET), model(SOURCE, TARGET)), options
        model.train()
        assert not torch.equal(model(SOURCE, TARGET), model(SOURCE, TARGET)), options
    model = build(dropout=0.0).train()  # and embed_dropout is as dropout
    assert torch.equal(model(SOURCE, TARGET), model(SOURCE, TARGET))


@pytest.mark.parametrize("positions", ["sinusoidal", "relative", "rotary"])
def test_autocast_trains_every_parameter(positions):
    model = build(MOE, positions=positions, dropout=0.0).float().train()
    expected = model(SOURCE, TARGET)
    with torch.autocast("cpu", torch.bfloat16):
        logits_BLV = model(SOURCE, TARGET)
    assert_close(logits_BLV.float(), expected, atol=0.15, rtol=0.1)
    with core.record(model) as tape, torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(model(SOURCE, TARGET).float().flatten(0, 1), TARGET.flatten())
    (loss + core.aux_loss(tape)).backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name


def test_gradients_of_padding_are_zero():
    # An embedding that is not tied to the output: that of padding is not trained.
    model = build(MOE, tie="none")
    model(SOURCE, TARGET)[TARGET != PAD_ID].sum().backward()
    assert not model.source_embed.weight.grad[PAD_ID].any()
    assert not model.target_embed.weight.grad[PAD_ID].any()


# ---- pictures, graphs, copies


def test_cross_attention_shows_where_each_layer_looks():
    model = build(MOE)
    weights = model.cross_attention(SOURCE, TARGET)
    assert weights.shape == (2, 3, 2, 4, 5)  # layers, B, H, L, S
    assert_close(weights.sum(-1), torch.ones(2, 3, 2, 4, dtype=torch.float64))
    assert not weights.masked_select((SOURCE == PAD_ID)[:, None, None]).any()
    # Of the last layer, weights and values give what the forward adds there.
    seen = []
    attention = model.decoder.layers[1].cross_attn
    hook = attention.register_forward_hook(lambda _, args, y: seen.append((*args[:2], y)))
    model(SOURCE, TARGET)
    hook.remove()
    _, memory_BSD, y_BLD = seen[0]
    v_BSHd = attention.kv(memory_BSD)[..., 16:].unflatten(-1, (2, 8))
    assert_close(attention.out(torch.einsum("bhls,bshd->blhd", weights[1], v_BSHd).flatten(2)), y_BLD)


def test_a_forward_leaves_nothing_behind():
    model = build(MOE)
    before = model(SOURCE, TARGET)
    twin = copy.deepcopy(model)
    model(SOURCE.flip(0), TARGET.flip(0))
    model.step(TARGET[:, 0], model.start(model.encode(SOURCE)))
    assert torch.equal(model(SOURCE, TARGET), before)
    assert torch.equal(twin(SOURCE, TARGET), before)


def test_a_forward_is_one_graph():
    model = build(MOE, ("all", "all"), positions="relative", encoder_layers=1, decoder_layers=1).float()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert_close(compiled(SOURCE, TARGET), model(SOURCE, TARGET))
    exported = torch.export.export(model, (SOURCE, TARGET)).module()
    assert_close(exported(SOURCE, TARGET), model(SOURCE, TARGET))


# ---- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source_vocab": 1}, "source_vocab=1 must be at least 2"),
        ({"target_vocab": 0}, "target_vocab=0 must be at least 2"),
        (
            {"target_vocab": 20},
            "tie='all' (model.transformer.tie) needs a joint vocabulary: with two, which data.tokenizer.joint=false "
            "makes, tie is 'decoder' or 'none'",
        ),
        ({"ffn": MOE, "encoder_moe_blocks": [2]}, "encoder_moe_blocks index 2 is out of range for depth=2"),
        (
            {"ffn": core.DenseFFN(8), "decoder_moe_blocks": "last3"},
            "decoder_moe_blocks='last3' does not fit depth=2: N is at most 1",
        ),
        (
            {"ffn": MOE, "encoder_moe_blocks": "none", "decoder_moe_blocks": []},
            "encoder_moe_blocks and decoder_moe_blocks name no block: leave moe out for a dense model",
        ),
        (
            {"ffn": core.MoEConfig(4, core.ExpertChoice())},
            "router ExpertChoice (arXiv 2202.09368) lets later tokens change earlier ones: not for a causal decoder",
        ),
    ],
)
def test_what_cannot_be_built_is_refused_in_one_line(options, message):
    with pytest.raises(ValueError) as error:
        TranslationModel(config(), **{"source_vocab": VOCAB, **options})
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vocab": 0}, "vocab=0 must be at least 2"),
        ({"ffn": MOE, "moe_blocks": "none"}, "moe_blocks='none' names no block: leave moe out for a dense model"),
        ({"ffn": MOE, "moe_blocks": "every3"}, "moe_blocks='every3' does not fit depth=2: N is at most 2"),
    ],
)
def test_language_models_that_cannot_be_built_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LanguageModel(config(), **{"vocab": VOCAB, **options})


def test_routers_that_see_the_whole_sequence_are_the_encoders():
    for router in (core.ExpertChoice(), core.Sentence(top_k=1)):
        model = build(core.MoEConfig(4, router), ("every2", "none"))
        assert list(core.moe_layers(model)) == ["encoder.layers.1.ffn"]
        logits_BLV = model(SOURCE, TARGET)
        cache = model.start(model.encode(SOURCE))
        assert_close(model.step(TARGET[:, 0], cache), logits_BLV[:, 0])


@pytest.mark.parametrize(
    "moe",
    [
        {"expert": core.FFN(hidden_dim=12, activation="relu", bias=True), "num_shared_experts": 2},
        {"expert": core.SwiGLU(hidden_dim=8), "router": core.Task(num_tasks=3, top_k=1)},
        {"expert": core.FFN(hidden_dim=12), "granularity": 2, "num_shared_experts": 1},
    ],
)
def test_the_network_of_one_task_says_what_the_sparse_one_says_of_it(moe):
    model = build(core.MoEConfig(4, **{"router": core.Task(num_tasks=3, top_k=2), **moe}), ("every2", "all"))
    with torch.no_grad():
        for layer in core.moe_layers(model).values():
            layer.router.gate.weight.normal_()
    model = model.double().eval()
    tasks_B = torch.full((len(SOURCE),), 1)
    expected, other = (model(SOURCE, TARGET, tasks) for tasks in (tasks_B, 1 - tasks_B))
    dense = core.cut_out(model, task=1)
    real_BL = TARGET != PAD_ID
    assert_close(dense(SOURCE, TARGET)[real_BL], expected[real_BL], rtol=0, atol=1e-12)
    assert not torch.allclose(expected[real_BL], other[real_BL])
