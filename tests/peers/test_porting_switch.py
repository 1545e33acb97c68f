"""T5 and Switch of transformers as our models, and back: the same logits and translations. Versions seen: 5.24.

Theirs takes norms and router scores in float32 whatever the model's dtype is. In float64 the tests let them be float64,
so that a difference is one of the models.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ported import VOCAB, Pair, PortedInDouble, check_own, modeling, randomize
from torch import nn

import core
from apps.nets.config import TransformerConfig
from apps.nets.transformer import TranslationModel

transformers = pytest.importorskip("transformers", minversion="5.0")

T5 = {
    "vocab_size": VOCAB,
    "d_model": 16,
    "d_kv": 6,
    "d_ff": 24,
    "num_layers": 3,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "relative_attention_max_distance": 20,
    "decoder_start_token_id": 0,
}
SWITCH = {
    **T5,
    "num_layers": 4,
    "num_decoder_layers": 4,
    "num_sparse_encoder_layers": 2,  # layers 1 and 3
    "num_sparse_decoder_layers": 1,  # layer 1
    "num_experts": 4,
    "expert_capacity": 64,
}
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "t5": ("t5", "T5", T5),
    "t5-v1.1": ("t5", "T5", {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    "mt5": ("mt5", "MT5", {**T5, "feed_forward_proj": "gated-gelu"}),
    "switch": ("switch_transformers", "SwitchTransformers", SWITCH),
    "switch-all-layers": (
        "switch_transformers",
        "SwitchTransformers",
        {**SWITCH, "num_sparse_encoder_layers": 4, "num_sparse_decoder_layers": 4, "router_bias": True},
    ),
    "switch-untied": ("switch_transformers", "SwitchTransformers", {**SWITCH, "tie_word_embeddings": False}),
}
OWN_HEAD = ("t5-v1.1", "mt5")


def peer(name: str) -> Any:
    module, prefix, options = CASES[name]
    modeling(module)
    model = getattr(transformers, f"{prefix}ForConditionalGeneration")(
        getattr(transformers, f"{prefix}Config")(**options)
    )
    if name in OWN_HEAD:
        # Published ones have an output of their own, whatever the configuration is made to say of it.
        model.lm_head.weight = nn.Parameter(torch.empty(VOCAB, 16))
    randomize(model)
    if name == "switch-untied":
        # `shared` is not read in their forward; ours writes the encoder's.
        model.shared.weight.data.copy_(model.encoder.embed_tokens.weight)
    return model


@pytest.fixture
def double_pair(double_pair: Pair, monkeypatch: pytest.MonkeyPatch) -> Pair:
    """Return a pair whose norms, theirs too, are in the dtype of the model."""
    for module, prefix in (("t5", "T5"), ("mt5", "MT5"), ("switch_transformers", "SwitchTransformers")):
        norm = getattr(modeling(module), f"{prefix}LayerNorm")
        monkeypatch.setattr(
            norm, "forward", lambda self, x: F.rms_norm(x, x.shape[-1:], self.weight, self.variance_epsilon)
        )
    return double_pair


class TestSwitch(PortedInDouble):
    pass


def test_experts_take_all_tokens_where_theirs_drop_by_capacity():
    # With room for one token of a sequence an expert, theirs leaves tokens out: ours is the model without a limit.
    pair = Pair.of(peer("switch"))
    for module in pair.theirs.modules():
        if hasattr(module, "expert_capacity"):
            module.expert_capacity = 1
    torch.manual_seed(1)
    theirs, ours = pair.logits()
    assert (ours - theirs).abs().max() > 1e-3
    for module in pair.theirs.modules():
        if hasattr(module, "expert_capacity"):
            module.expert_capacity = 9
    torch.manual_seed(1)
    theirs, ours = pair.logits()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-4)


def test_a_model_of_our_own_is_read_by_transformers(tmp_path):
    # One id less: theirs starts with padding, and has no id for that beside it.
    config = TransformerConfig(
        "nano",
        positions="relative",
        norm="rms",
        bias=False,
        scale_embeddings=False,
        attention_scale=1.0,
        logits_scale=0.125,  # 64 ** -0.5
        dropout=0.0,
    )
    model = TranslationModel(
        config,
        source_vocab=VOCAB + 1,
        ffn=core.MoEConfig(4, core.TokenChoice(top_k=1), core.FFN(128, "relu")),
        decoder_moe_blocks="none",
    )
    pair = check_own(model, transformers.SwitchTransformersForConditionalGeneration, tmp_path)
    assert pair.theirs.config.vocab_size == VOCAB
    torch.testing.assert_close(*pair.logits(), rtol=1e-5, atol=2e-4)
    ids = torch.randint(4, VOCAB + 1, (3, 8))
    torch.testing.assert_close(pair.ours(ids, ids)[..., 3:], model(ids, ids)[..., 3:], rtol=0, atol=0)
