"""Attention experts in the transformers: against ordinary attention, step by step, and what is refused."""

import pytest
import torch
from torch.testing import assert_close

import core
from apps.data.subwords import PAD_ID
from apps.equal_cost import routers
from apps.nets import transformer
from apps.nets.attention import Mask, SelfAttention
from apps.nets.config import TransformerConfig
from apps.nets.expert_attention import ExpertAttention
from apps.nets.positions import rotations
from apps.nets.transformer import LanguageModel, TranslationModel

VOCAB = 20
SOURCE = torch.tensor([[5, 6, 7, 3, 0], [8, 9, 10, 11, 3], [4, 3, 0, 0, 0]])
TARGET = torch.tensor([[2, 5, 6, 7], [2, 9, 9, 4], [2, 4, 0, 0]])
POSITIONS = ("sinusoidal", "learned", "rotary", "none")
HEADS = core.AttentionExperts(head_dim=6, heads_per_expert=2)
ATTENTION = core.MoEConfig(4, core.TokenChoice(2), HEADS)
MOE = core.MoEConfig(4, core.TokenChoice(2), core.FFN(12))


CONVOLUTIONS = core.MoEConfig(4, core.TokenChoice(2), core.Convolution())


def config(**options):
    return TransformerConfig("nano", **{"dim": 16, "hidden_dim": 24, **options})


def translation_model(attention=ATTENTION, moe=None, **options):
    torch.manual_seed(0)
    model = TranslationModel(config(**options), source_vocab=VOCAB, ffn=moe, attention_moe=attention)
    return model.double().eval()


def language_model(attention=ATTENTION, moe=None, **options):
    torch.manual_seed(0)
    return LanguageModel(config(**options), vocab=VOCAB, ffn=moe, attention_moe=attention).double().eval()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("positions", ["none", "rotary"])
def test_one_expert_of_all_heads_is_self_attention(positions, bias):
    torch.manual_seed(0)
    sizes = config(num_heads=2, head_dim=6, bias=False, positions=positions, attn_dropout=0.3)
    dense = SelfAttention(sizes).double().eval()
    moe = core.MoEConfig(1, core.TokenChoice(1, normalize=False), HEADS)
    sparse = ExpertAttention(sizes, moe, causal=True).double().eval()
    with torch.no_grad():
        q, kv = dense.qkv.weight.split((12, 24))
        sparse.heads.kv.weight.copy_(kv)
        sparse.heads.experts.w_q[0] = q.T
        sparse.heads.experts.w_out[0] = dense.out.weight.T
    x = torch.randn(3, 5, 16).double()
    turns = rotations(0, 5, 6, 10000.0, x) if positions == "rotary" else None
    if bias:
        hidden = torch.full((5, 5), torch.finfo(x.dtype).min, dtype=x.dtype).triu(1)
        mask = many = Mask(hidden[None])
    else:  # of each sequence its own keys
        hidden = torch.zeros(3, 1, 5).double()
        hidden[1, 0, 3:] = torch.finfo(x.dtype).min
        mask, many = Mask(hidden), Mask(hidden.repeat_interleave(2, 0))
    assert_close(sparse(x, mask, turns, core.RoutingContext()), dense(x, many, turns))
    # Dropout is in training alone.
    assert not torch.equal(sparse.train()(x, mask, turns, core.RoutingContext()), dense(x, many, turns))


def test_padding_is_not_routed_and_every_layer_records():
    model = translation_model(moe=MOE)
    with core.record(model) as tape:
        model(SOURCE, TARGET)
    entries = {entry.name: entry for entry in tape.entries if entry.name.endswith("mixing.heads")}
    assert list(entries) == [f"{side}.layers.{i}.mixing.heads" for side in ("encoder", "decoder") for i in (0, 1)]
    for name, entry in entries.items():
        real = int(((SOURCE if name.startswith("encoder") else TARGET) != PAD_ID).sum())
        assert int(entry.routing.tokens_per_expert_E.sum()) == 2 * real


@pytest.mark.parametrize(
    "positions, norm, moe", [*zip(POSITIONS, ("layer", "rms") * 2, (MOE, MOE, None, None), strict=True)]
)
def test_steps_equal_the_whole_sequence_and_padding_changes_nothing(positions, norm, moe, monkeypatch):
    monkeypatch.setattr(transformer, "SLOTS", 1)
    real_BL = TARGET != PAD_ID
    model = translation_model(moe=moe, positions=positions, norm=norm)
    logits, cache = model(SOURCE, TARGET), model.start(model.encode(SOURCE))
    alone = language_model(moe=moe, positions=positions, norm=norm)
    alone_logits, alone_cache = alone(TARGET), alone.start(3)
    for t in range(TARGET.shape[1]):
        real = real_BL[:, t]
        assert_close(model.step(TARGET[:, t], cache)[real], logits[:, t][real])
        assert_close(alone.step(TARGET[:, t], alone_cache)[real], alone_logits[:, t][real])
    # Keys and values of 2 heads, however many experts read them.
    assert cache.store.shape[:3] == (2, 2, 3 * HEADS.heads_per_expert)
    assert cache.store.shape[4] == HEADS.head_dim
    for row, (S, L) in enumerate(((4, 4), (5, 4), (2, 2))):
        assert_close(model(SOURCE[row : row + 1, :S], TARGET[row : row + 1, :L])[0], logits[row, :L])
    # A scale of the scores is heeded.
    scaled = (language_model(moe=moe, positions=positions, norm=norm, attention_scale=s) for s in (6**-0.5, 2.0))
    assert [torch.allclose(own(TARGET), alone_logits) for own in scaled] == [True, False]


def test_steps_equal_the_whole_sequence_with_every_router_that_a_decoder_accepts():
    ids_B, real_BL, refused = torch.tensor([0, 1, 0]), TARGET != PAD_ID, set()
    plain = core.MoEConfig(8, core.TokenChoice(2), core.FFN(12))
    for name in routers.overlays():
        router = routers.with_router(plain, name).router
        if not router.is_causal or router.layer_kind != "pairs":
            continue
        model = language_model(core.MoEConfig(8, router, HEADS), decoder_layers=1, positions="rotary")
        logits = model(TARGET, ids_B, ids_B)
        try:
            cache = model.start(3, ids_B, ids_B)
        except ValueError as error:
            refused.add((name, "cannot decode step by step" in str(error)))
            continue
        for t in range(TARGET.shape[1]):
            assert_close(model.step(TARGET[:, t], cache)[real_BL[:, t]], logits[:, t][real_BL[:, t]], msg=name)
    assert refused == {("ensemble", True), ("random", True)}


def test_a_step_heeds_autocast_and_multiplies_by_the_keys_weights():
    model = language_model().float()
    assert any(weight is model.decoder.layers[0].mixing.heads.kv.weight for weight in model.step_weights())
    expected, cache = model(TARGET), None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cache = model.start(3)
        for t in range(2):
            logits = model.step(TARGET[:, t], cache)
    assert cache.store.dtype == torch.bfloat16
    assert_close(logits, expected[:, 1], rtol=0.05, atol=0.05)


@pytest.mark.parametrize("kind", ["float32", "autocast"])
def test_every_parameter_is_trained_from_its_initial_weight(kind):
    model = translation_model(moe=MOE).float().train()
    heads, bound = model.decoder.layers[0].mixing.heads, (6 / (16 + 12)) ** 0.5
    for weight, gain in ((heads.experts.w_q, 2**-0.5), (heads.kv.weight, 2**-0.5), (heads.experts.w_out, 1.0)):
        assert 0.9 * gain * bound < float(weight.detach().abs().max()) <= gain * bound
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=kind == "autocast"), core.record(model) as tape:
        loss = model(SOURCE, TARGET).float().logsumexp(-1).sum()
    (loss + core.aux_loss(tape)).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    assert all(p.grad.any() for n, p in model.named_parameters() if ".mixing." in n and not n.endswith("bias"))


NOT_CAUSAL = core.MoEConfig(4, core.ExpertChoice(), HEADS)
ODD = core.MoEConfig(4, core.TokenChoice(2), core.AttentionExperts(5))


@pytest.mark.parametrize(
    "attention, options, message",
    [
        (MOE, {}, "^attention_moe.expert is FFN, and must be AttentionExperts$"),
        (ATTENTION, {"qk_norm": "head"}, "^qk_norm='head' is of fixed heads, and attention_moe's are chosen$"),
        (ATTENTION, {"positions": "relative"}, "^positions='relative' has a bias for each head, which attention_moe's"),
        (ODD, {"positions": "rotary"}, "^attention_moe.expert.head_dim=5 must be even for positions='rotary'$"),
        (NOT_CAUSAL, {}, "lets later tokens change earlier ones: not for a causal decoder"),
        (None, {"moe": ATTENTION}, "^moe.expert is AttentionExperts, which is no FFN: AttentionExperts stand in at"),
        (None, {"moe": CONVOLUTIONS}, "^moe.expert is Convolution, which is no FFN$"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)
def test_what_cannot_be_built_is_refused_in_one_line(attention, options, message):
    for build in (translation_model, language_model):
        with pytest.raises(ValueError, match=message) as error:
            build(attention, **options)
        assert "\n" not in str(error.value)
