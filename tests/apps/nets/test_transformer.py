"""The translation model and the language model."""

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
    blocks = dict(zip(("encoder_moe_blocks", "decoder_moe_blocks"), layers, strict=True))
    sizes = {"source_vocab": VOCAB, "target_vocab": target_vocab}
    return TranslationModel(config(**options), **sizes, ffn=ffn or moe, **blocks).double().eval()


def language_model(moe=None, layers="all", **options):
    torch.manual_seed(0)
    return LanguageModel(config(**options), vocab=VOCAB, ffn=moe, moe_blocks=layers).double().eval()


@pytest.mark.parametrize("moe", [None, MOE], ids=["dense", "sparse"])
@pytest.mark.parametrize("positions, norm", [*zip(POSITIONS, ("layer", "rms", "rms", "layer", "layer"), strict=True)])
def test_steps_equal_the_whole_sequence(positions, norm, moe, monkeypatch):
    monkeypatch.setattr(transformer, "SLOTS", 1)
    model = build(moe, positions=positions, norm=norm)
    logits_BLV = model(SOURCE, TARGET)
    cache = model.start(model.encode(SOURCE)).expand(2)
    for t in range(TARGET.shape[1]):
        logits_RV = model.step(TARGET[:, t].repeat_interleave(2), cache)
        assert_close(logits_RV.view(3, 2, VOCAB), logits_BLV[:, t, None].expand(3, 2, VOCAB))
    language = language_model(moe, positions=positions, norm=norm)
    steps_equal_the_sequence(language)


def steps_equal_the_sequence(model, *context, name=""):
    logits_BLV, cache, real_BL = model(TARGET, *context), model.start(3, *context), TARGET != PAD_ID
    for t in range(TARGET.shape[1]):
        assert_close(model.step(TARGET[:, t], cache)[real_BL[:, t]], logits_BLV[:, t][real_BL[:, t]], msg=name or None)


def test_steps_equal_the_whole_sequence_with_every_router_that_a_decoder_accepts():
    ids_B, refused = torch.tensor([0, 1, 0]), {}
    moes = {name: routers.with_router(dataclasses.replace(MOE, num_experts=8), name) for name in routers.overlays()}
    moes["random_average"] = dataclasses.replace(MOE, router=core.Random(evaluation="average"))
    for name, moe in moes.items():
        if not moe.router.is_causal:
            continue
        model = language_model(moe, decoder_layers=1)
        assert model(TARGET, ids_B, ids_B).isfinite().all(), name  # what cannot decode scores all the same
        try:
            model.start(3, ids_B, ids_B)
        except ValueError as error:
            refused[name] = str(error)
        else:
            steps_equal_the_sequence(model, ids_B, ids_B, name=name)
    assert set(refused) == {"ensemble", "lory", "mixture_of_tokens", "random"}
    assert refused["lory"] == (
        "router Merge(kind='lory') (arXiv 2405.03133) trains and scores, but cannot decode step by step: a token's "
        "experts depend on other tokens; take another router for the decoder"
    )
    # In the encoder they stand where they will, as do those that see the whole sequence.
    for router in (core.Random(), core.ExpertChoice(), core.Sentence(top_k=1), core.Hash(vocab_size=VOCAB)):
        model = build(core.MoEConfig(4, router), ("every2", "none"))
        assert list(core.moe_layers(model)) == ["encoder.layers.1.ffn"]
        cache = model.start(model.encode(SOURCE))
        if not isinstance(router, core.Random):
            assert_close(model.step(TARGET[:, 0], cache), model(SOURCE, TARGET)[:, 0])
    with pytest.raises(ValueError, match=r"router Random .* a token's experts depend on its place"):
        build(core.MoEConfig(4, core.Random()), ("none", "all")).start(model.encode(SOURCE))


def test_logits_of_a_step_are_float32_whatever_the_weights_are_and_keys_heed_autocast():
    model = build(MOE)
    for dtype, expected in ((torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16,) * 2):
        model.to(dtype)
        cache = model.start(model.encode(SOURCE))
        logits_RV = model.step(TARGET[:, 0], cache)
        assert logits_RV.dtype == (torch.float32 if dtype == torch.bfloat16 else dtype)
        assert cache.store.dtype == cache.memory.dtype == expected
        assert not logits_RV.requires_grad
    model = build(MOE).float()
    with torch.autocast("cpu", torch.bfloat16):
        cache = model.start(model.encode(SOURCE)).expand(2)
        logits_RV = model.step(TARGET[:, 0].repeat_interleave(2), cache)
    assert cache.store.dtype == torch.bfloat16
    assert_close(logits_RV[::2], model(SOURCE, TARGET)[:, 0], atol=0.1, rtol=0.1)


@pytest.mark.parametrize("positions, moe", [*zip(POSITIONS, (None, MOE, MOE, MOE, None), strict=True)])
def test_padding_and_other_sentences_change_nothing(positions, moe):
    model = build(moe, positions=positions)
    logits_BLV, real_BL = model(SOURCE, TARGET), TARGET != PAD_ID
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
    assert_close(model(SOURCE, TARGET)[real_BL][:, 1:], logits_BLV[real_BL][:, 1:])
    # Of nothing else, and of no sentence at all.
    assert build(moe, positions=positions)(torch.tensor([[0, 0], [4, 3]]), TARGET[:2]).isfinite().all()
    assert model(SOURCE[:0], TARGET[:0]).shape == (0, 4, VOCAB)


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


def test_without_positions_a_source_is_a_bag_and_with_them_it_is_not():
    turned = torch.tensor([[7, 6, 5, 3, 0], [11, 10, 9, 8, 3], [4, 3, 0, 0, 0]])
    for positions in POSITIONS:
        model = build(positions=positions)
        same = torch.allclose(model(SOURCE, TARGET), model(turned, TARGET))
        assert same == (positions == "none"), positions


@pytest.mark.parametrize(
    "layers, encoder, decoder",
    [
        (("every2", "every2"), (1, 3), (1,)),
        (("last1", "all"), (3,), (0, 1, 2)),
        (("none", [0, -1]), (), (0, 2)),
        (([2], "none"), (2,), ()),
    ],
)
def test_moe_blocks_have_moe_layers(layers, encoder, decoder):
    model = build(MOE, layers, encoder_layers=4, decoder_layers=3)
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


@pytest.mark.parametrize(
    ("tie", "target_vocab", "vectors"),
    # Rows of D numbers in embeddings and output: 20 of each vocabulary, or 20 and 30.
    [("all", None, 20), ("inputs", None, 40), *(("decoder", None, 40), ("decoder", 30, 50)), ("none", 30, 80)],
)
def test_tied_weights_are_one_parameter(tie, target_vocab, vectors):
    model, size = build(tie=tie, target_vocab=target_vocab), target_vocab or VOCAB
    of_vocabularies = [p for p in model.parameters() if p.shape[-1:] == (16,) and p.shape[0] in (VOCAB, 30)]
    assert sum(len(p) for p in of_vocabularies) == vectors
    assert len(model.state_dict()) == len(list(model.parameters()))
    assert model.output_weight.shape == (size, 16)
    assert model.logits(torch.ones(2, 16, dtype=torch.float64)).shape == (2, size)
    assert (model.output_weight is model.target_embedding.weight) == (tie in ("all", "decoder"))
    assert (model.source_embed is model.target_embedding) == (tie in ("all", "inputs"))
    model(SOURCE, TARGET).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_scales_of_embeddings_and_logits_and_a_decoder_that_starts_with_the_end():
    # Positions and layers apart, an embedding is multiplied by sqrt(16) = 4, and a hidden state by the logits' scale.
    scaled, plain = build(positions="none"), build(positions="none", scale_embeddings=False)
    with torch.no_grad():
        plain.source_embed.weight.mul_(4.0)
    assert_close(scaled.encode(SOURCE).x_BSD, plain.encode(SOURCE).x_BSD)
    model, h = build(logits_scale=0.25), torch.randn(3, 16, dtype=torch.float64)
    assert_close(model.logits(h), 0.25 * h @ model.output_weight.t())
    by_end, plain = build(start="eos"), build()
    with torch.no_grad():
        plain.source_embed.weight[2] = plain.source_embed.weight[3]
    of_others = [i for i in range(VOCAB) if i != 2]  # the output of id 2 is tied to it
    assert_close(by_end(SOURCE, TARGET)[..., of_others], plain(SOURCE, TARGET)[..., of_others])


def test_a_language_model_of_a_known_kind():
    router = core.TokenChoice(top_k=2, score_func="sigmoid", expert_bias=True)
    moe = core.MoEConfig(8, router, core.SwiGLU(hidden_dim=12), num_shared_experts=1)
    kind = {"positions": "rotary", "norm": "rms", "num_kv_heads": 1, "gated": True, "activation": "silu"}
    kind |= {"decoder_layers": 3, "bias": False, "tie": "none", "scale_embeddings": False}
    model = language_model(moe, layers=[1, 2], **kind)
    assert model.decoder.layers[0].mixing.qkv.weight.shape == ((2 + 1 + 1) * 8, 16)
    assert model.decoder.layers[0].cross_attn is None
    assert [name for name, _ in model.named_parameters() if "bias" in name and "router" not in name] == []
    assert list(core.moe_layers(model)) == ["decoder.layers.1.ffn", "decoder.layers.2.ffn"]
    assert isinstance(model.decoder.layers[0].ffn, core.layers.FeedForward)
    steps_equal_the_sequence(model)


def test_costs_are_those_of_a_hand_count():
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
    # The third position of 2 sentences of 5 copies, one layer: keys of all copies are read, and the memory once.
    N, K, S, T, D, F_, V = 2, 5, 3, 3, 16, 24, 20
    model = build(encoder_layers=1, decoder_layers=1)
    source, token_R = torch.randint(4, V, (N, S)), torch.full((N * K,), 4)
    cache = model.start(model.encode(source)).expand(K)
    for _ in range(2):
        model.step(token_R, cache)
    by_hand = 2 * N * K * (6 * D**2 + 2 * T * K * D + 2 * S * D + 2 * D * F_ + D * V)
    assert core.count_flops(model.step, token_R, cache) == by_hand
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
    D, dense, sparse = 64, model.encoder.layers[0].ffn, model.encoder.layers[1].ffn
    cross, mixing = model.decoder.layers[0].cross_attn, model.encoder.layers[0].mixing
    experts = (sparse.experts.w_in[3], sparse.experts.w_out[0], sparse.shared_experts.w_in[0])
    for bound, weights in (
        (math.sqrt(6 / (64 + 256)), (dense.w_in.weight, *experts)),
        # At 1 / sqrt(2) of sqrt(6 / (D + D)): as one matrix of 3 D x D.
        (math.sqrt(3 / (2 * D)), (cross.q.weight, *cross.kv.weight.chunk(2), *mixing.qkv.weight.chunk(3))),
    ):
        for weight in weights:
            assert 0.99 * bound < weight.abs().max() <= bound
    for bias in (dense.w_in.bias, sparse.experts.b_in, sparse.shared_experts.b_out):
        assert not bias.any()
    assert not model.source_embed.weight[PAD_ID].any()
    assert model.source_embed.weight.std().item() == pytest.approx(D**-0.5, rel=0.02)
    # A router's weights are its own: variance 0.1 / D.
    assert sparse.router.gate.weight.std().item() < 2 * math.sqrt(0.1 / D)


def test_something_is_dropped_and_every_parameter_trained_but_the_embedding_of_padding():
    for options in ({"dropout": 0.5}, {"dropout": 0.0, "ffn_dropout": 0.5}, {"dropout": 0.0, "attn_dropout": 0.5}):
        model = build(**{"embed_dropout": 0.0, **options})
        assert torch.equal(model(SOURCE, TARGET), model(SOURCE, TARGET)), options
        assert not torch.equal(model.train()(SOURCE, TARGET), model(SOURCE, TARGET)), options
    model = build(dropout=0.0).train()  # and embed_dropout is as dropout
    assert torch.equal(model(SOURCE, TARGET), model(SOURCE, TARGET))
    model = build(MOE, positions="relative", dropout=0.0).float().train()
    expected = model(SOURCE, TARGET)
    with core.record(model) as tape, torch.autocast("cpu", torch.bfloat16):
        logits_BLV = model(SOURCE, TARGET)
        loss = F.cross_entropy(logits_BLV.float().flatten(0, 1), TARGET.flatten())
    assert_close(logits_BLV.float(), expected, atol=0.15, rtol=0.1)
    (loss + core.aux_loss(tape)).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    # An embedding that is not tied to the output: that of padding is not trained.
    model = build(MOE, tie="none")
    model(SOURCE, TARGET)[TARGET != PAD_ID].sum().backward()
    assert not model.source_embed.weight.grad[PAD_ID].any()
    assert not model.target_embed.weight.grad[PAD_ID].any()


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
    ((_, memory_BSD, y_BLD),) = seen
    v_BSHd = attention.kv(memory_BSD)[..., 16:].unflatten(-1, (2, 8))
    assert_close(attention.out(torch.einsum("bhls,bshd->blhd", weights[1], v_BSHd).flatten(2)), y_BLD)


def test_a_forward_is_one_graph():
    model = build(MOE, ("all", "all"), positions="relative", encoder_layers=1, decoder_layers=1).float()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert_close(compiled(SOURCE, TARGET), model(SOURCE, TARGET))


TIED = "tie='all' (model.transformer.tie) needs a joint vocabulary: with two, which data.tokenizer.joint=false makes, "
TIED += "tie is 'decoder' or 'none'"
NO_BLOCK = "encoder_moe_blocks and decoder_moe_blocks name no block: leave moe out for a dense model"
BEYOND = "decoder_moe_blocks='last3' does not fit depth=2: N is at most 1"
ACAUSAL = "router ExpertChoice (arXiv 2202.09368) lets later tokens change earlier ones: not for a causal decoder"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source_vocab": 1}, "source_vocab=1 must be at least 2"),
        ({"target_vocab": 0}, "target_vocab=0 must be at least 2"),
        ({"target_vocab": 20}, TIED),
        ({"ffn": MOE, "encoder_moe_blocks": [2]}, "encoder_moe_blocks index 2 is out of range for depth=2"),
        ({"ffn": core.DenseFFN(8), "decoder_moe_blocks": "last3"}, BEYOND),
        ({"ffn": MOE, "encoder_moe_blocks": "none", "decoder_moe_blocks": []}, NO_BLOCK),
        ({"ffn": core.MoEConfig(4, core.ExpertChoice())}, ACAUSAL),
        ({"vocab": 0}, "vocab=0 must be at least 2"),
        ({"ffn": MOE, "moe_blocks": "none"}, "moe_blocks='none' names no block: leave moe out for a dense model"),
        ({"ffn": MOE, "moe_blocks": "every3"}, "moe_blocks='every3' does not fit depth=2: N is at most 2"),
    ],
)
def test_what_cannot_be_built_is_refused_in_one_line(options, message):
    of_text = {"vocab", "moe_blocks"} & {*options}
    kind, vocab = (LanguageModel, "vocab") if of_text else (TranslationModel, "source_vocab")
    with pytest.raises(ValueError) as error:
        kind(config(), **{vocab: VOCAB, **options})
    assert str(error.value) == message
