"""Refusals name what a checkpoint and a model, or a published architecture, do not share."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from published_models import EXPERTS, MODELS, NLLB, VOCAB, checkpoint, same_weights, switch_model, two_of_four
from published_shapes import MIXTRAL, T5

import core
from apps.nets.depths import MixtureOfDepths
from apps.nets.transformer import LanguageModel, TranslationModel
from apps.nets.universal import Universal
from apps.porting import from_published, load_pretrained, load_pretrained_weights, save_pretrained, to_published


def test_weights_go_into_a_model_that_is_built_as_theirs(tmp_path):
    checkpoint(tmp_path)
    # Dropout, capacity, noise and losses of its own.
    moe = replace(EXPERTS, router=core.TokenChoice(top_k=1, jitter_eps=0.1), capacity_factor=1.25)
    moe = replace(moe, balance=core.Balance(load_balancing_loss=0.5))
    model = switch_model(replace(T5, dropout=0.3, ffn_dropout=0.2), ffn=moe)
    load_pretrained_weights(model, tmp_path)
    assert same_weights(model, load_pretrained(tmp_path))


def test_nllb_gates_normalized_after_drops_are_written_so_and_are_no_misfit(tmp_path):
    # Without a capacity nothing is dropped, so that the logits are the same.
    before = TranslationModel(NLLB, source_vocab=VOCAB, ffn=two_of_four()).eval()
    kept = replace(two_of_four(), router=core.TokenChoice(top_k=2, normalize="kept"))
    after = TranslationModel(NLLB, source_vocab=VOCAB, ffn=kept).eval()
    name = "normalize_router_prob_before_dropping"
    assert [to_published(model)[0][name] for model in (before, after)] == [True, False]
    save_pretrained(before, tmp_path)
    load_pretrained_weights(after, tmp_path)
    ids = torch.randint(4, VOCAB, (2, 7))
    torch.testing.assert_close(after(ids, ids), before(ids, ids), rtol=1e-5, atol=1e-6)


def translation(config=T5, **options):
    return TranslationModel(config, **{"source_vocab": VOCAB, **options})


def decoder(config=MIXTRAL, **options):
    return LanguageModel(config, vocab=VOCAB, **options)


def experts(**changes):
    return switch_model(ffn=replace(EXPERTS, **changes))


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: switch_model(replace(T5, size="tiny")), "encoder_layers=4 of the model is, in F, 2"),
        (lambda: switch_model(replace(T5, norm="layer")), "norm='layer' of the model is, in F, 'rms'"),
        (lambda: switch_model(ffn=None), "encoder_moe_blocks=() of the model is, in F, (1,)"),
        (lambda: experts(num_experts=8), "moe.num_experts=8 of the model is, in F, 4"),
        (
            lambda: experts(expert=core.FFN(128, "gelu")),
            "moe.expert=FFN(hidden_dim=128, activation='gelu', bias=False) of the model is, in F, "
            "FFN(hidden_dim=128, activation='relu', bias=False)",
        ),
        (decoder, "a LanguageModel is not what F holds: switch_transformers"),
        (lambda: translation(source_vocab=VOCAB + 1, ffn=EXPERTS), "tie='inputs' of the model is, in F, 'all'"),
        (lambda: translation(replace(T5, tie="none"), target_vocab=31, ffn=EXPERTS),
         "tie='none' of the model is, in F, 'all'"),
        (lambda: translation(replace(T5, tie="all", logits_scale=0.125), source_vocab=VOCAB + 1, ffn=EXPERTS),
         "vocab_size=31 of the model is, in F, 30"),
    ],
)  # fmt: skip
def test_a_model_built_otherwise_is_refused_with_both_values(tmp_path, build, message):
    checkpoint(tmp_path)
    with pytest.raises(ValueError) as error:
        load_pretrained_weights(build(), tmp_path)
    assert str(error.value).replace(str(tmp_path), "F") == message


TWO_ATTENTIONS = core.MoEConfig(4, expert=core.AttentionExperts(4))
SHARED = {"ffn": core.MoEConfig(4, expert=core.SwiGLU(8)), "share_experts": True}


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: translation(replace(T5, positions="rotary")),
         "positions='rotary': no published encoder-decoder here has them"),
        (lambda: translation(replace(T5, norm="layer")), "norm='layer' cannot be said in t5, which has 'rms'"),
        (lambda: translation(replace(T5, tie="decoder")),
         "tie='decoder': published models tie all embeddings, or not the output"),
        (lambda: translation(replace(NLLB, tie="none"), target_vocab=40),
         "vocab_size=(30, 40) cannot be said in m2m_100, which has 40"),
        (lambda: translation(NLLB, copies=True), "copy=True cannot be said in m2m_100, which has no weights for it"),
        (lambda: translation(ffn=core.DenseFFN(256)),
         "encoder.layers.1.ffn.w_in.weight of shape (256, 64) is (128, 64) in t5"),
        (lambda: switch_model(replace(T5, encoder_layers=6), encoder_moe_blocks=[0, 1]),
         "moe layers [0, 1] of 6 are not every n-th layer, as published models have them"),
        (lambda: switch_model(ffn=[EXPERTS] * 2),
         "moe lists 2 layers: published models have one for all sparse blocks"),
        (lambda: experts(num_shared_experts=1),
         "moe.num_shared_experts=1 cannot be said in switch_transformers, which has 0"),
        (lambda: experts(output_bias=True),
         "moe.output_bias=True cannot be said in switch_transformers, which has False"),
        (lambda: experts(expert=core.ClampedSwiGLU(32)),
         "expert ClampedSwiGLU cannot be said in switch_transformers, which has FFN or SwiGLU"),
        (lambda: experts(router=core.Hash(VOCAB)),
         "router Hash cannot be said in switch_transformers, which has TokenChoice"),
        (lambda: decoder(attention_moe=TWO_ATTENTIONS),
         "attention_moe cannot be said in mistral, whose heads are fixed"),
        (lambda: decoder(replace(MIXTRAL, norm="layer")), "norm='layer' cannot be said in mistral, which has 'rms'"),
        (lambda: decoder(replace(MIXTRAL, qk_norm="all")), "qk_norm='all' cannot be said in mistral, which has 'none'"),
        (lambda: decoder(depths=MixtureOfDepths(0.5, predictor=True)),
         "depths=MixtureOfDepths(...): every token enters every layer of a mistral..."),
        (lambda: decoder(universal=Universal()),
         "universal=Universal(...): a mistral has a layer for each step of depth..."),
        (lambda: decoder(**SHARED), "share_experts=True: every layer of a mixtral has experts of its own..."),
    ],
)  # fmt: skip
def test_what_published_architectures_lack_is_named(build, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$".replace(r"\.\.\.", ".*")):
        to_published(build())


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("mistral", {"sliding_window": 4096}, "sliding_window=4096: attention to the last tokens alone"),
        ("mistral", {"rope_parameters": {"rope_type": "yarn"}}, "rope_type='yarn': rotary positions are 'default'"),
        ("mistral", {"rope_scaling": {"type": "linear", "factor": 2}}, "rope_type='linear': rotary positions are"),
        ("mistral", {"hidden_act": "quick_gelu"}, "activation='quick_gelu' is not one of relu, gelu"),
        ("mistral", {"hidden_size": None}, "config.json of a mistral says no hidden_size"),
        (
            "glm4_moe",
            {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "partial_rotary_factor=0.5",
        ),
        ("mixtral", {"num_experts_per_tok": 1}, "normalize=True with top_k=1 makes every gate 1"),
        ("olmoe", {"clip_qkv": 8.0}, "clip_qkv=8.0: queries, keys and values are not clipped in our models"),
        ("qwen3_moe", {"attention_bias": True}, "attention_bias=True: our models have no bias after attention"),
        ("m2m_100", {"encoder_ffn_dim": 7}, "encoder_ffn_dim=7 is not decoder_ffn_dim=128: here they are one"),
        ("nllb-moe", {"second_expert_policy": "sampling"}, "second_expert_policy='sampling' is not one of all, random"),
        ("t5", {"d_model": "16"}, "config.json of a t5 says d_model='16', which is not an integer"),
        ("m2m_100", {"encoder_layers": True}, "config.json of a m2m_100 says encoder_layers=True, which is not an int"),
        ("t5", {"dropout_rate": None}, "config.json of a t5 holds a value of another kind than it should: float()"),
        ("mixtral", {"rope_parameters": [1]}, "config.json of a mixtral holds a value of another kind than it"),
        ("t5", {"eos_token_id": []}, "config.json says eos_token_id=[], which is no id"),
        ("mistral", {"bos_token_id": ["1"]}, "config.json says bos_token_id=['1'], which is no id"),
        ("t5", {"eos_token_id": 40}, "the id 40 of eos is not in a vocabulary of vocab_size=29"),
    ],
)
def test_what_our_models_lack_is_named(name, changes, message):
    config, tensors = to_published(MODELS[name]())
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        from_published({**config, **changes}, tensors)


def test_what_a_conversion_makes_and_published_models_lack_is_named():
    model = MODELS["mixtral"]()
    statistics = core.expert_statistics(model, [torch.randint(4, VOCAB, (2, 9))])
    core.convert.keep_experts(core.moe_layers(model)["decoder.layers.0.ffn"], [0, 1])
    with pytest.raises(ValueError, match=r"^the MoE layers have \[2, 4\] experts: published models have one"):
        to_published(model)
    model = MODELS["mixtral"]()
    core.prune_experts(model, statistics, 2, constants=True)
    with pytest.raises(ValueError, match=r"^the model has no decoder.layers.0.ffn.experts.w_in, which a mixtral has$"):
        to_published(model)
    with pytest.raises(ValueError, match=r"^a dense model cannot be said in switch_transformers: model_type='t5' has"):
        to_published(core.densify(switch_model()), model_type="switch_transformers")
