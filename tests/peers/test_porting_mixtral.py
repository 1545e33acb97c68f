"""Mixtral, Qwen2-MoE, Qwen3-MoE, their dense parents, OLMoE and GLM-4.5's layout of transformers as our language
models, and back. Versions seen: 5.24.

Theirs takes norms, rotations and router scores in float32 whatever the model's dtype is: there is no test in float64.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ported import VOCAB, Pair, Ported, check_own, modeling, randomize

import core
from apps.nets.config import TransformerConfig
from apps.nets.transformer import LanguageModel

transformers = pytest.importorskip("transformers", minversion="5.0")

MISTRAL = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "sliding_window": None,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
}
QWEN = {**MISTRAL, "bos_token_id": VOCAB - 3, "eos_token_id": VOCAB - 3}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
    "shared_expert_intermediate_size": 36,
}
QWEN3 = {**QWEN, **{name: EXPERTS[name] for name in ("num_experts", "num_experts_per_tok", "moe_intermediate_size")}}
OLMOE = {
    **{name: value for name, value in MISTRAL.items() if name != "sliding_window"},
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "pad_token_id": 1,
    "eos_token_id": VOCAB - 5,
}
GLM = {
    **{name: value for name, value in MISTRAL.items() if name != "sliding_window"},
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0, "partial_rotary_factor": 1.0},
    "partial_rotary_factor": 1.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
    "n_shared_experts": 2,
}
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "mistral": ("mistral", "Mistral", MISTRAL),
    "mistral-tied": ("mistral", "Mistral", {**MISTRAL, "tie_word_embeddings": True, "head_dim": 6}),
    "mixtral": ("mixtral", "Mixtral", {**MISTRAL, "num_local_experts": 4}),
    "mixtral-3": ("mixtral", "Mixtral", {**MISTRAL, "num_local_experts": 4, "num_experts_per_tok": 3}),
    "qwen2": ("qwen2", "Qwen2", QWEN),
    "qwen2-chat": ("qwen2", "Qwen2", {**QWEN, "eos_token_id": VOCAB - 2, "pad_token_id": VOCAB - 3}),
    "qwen2-moe": ("qwen2_moe", "Qwen2Moe", {**QWEN, **EXPERTS}),
    "qwen2-moe-normalized": ("qwen2_moe", "Qwen2Moe", {**QWEN, **EXPERTS, "norm_topk_prob": True}),
    "qwen2-moe-some-dense": ("qwen2_moe", "Qwen2Moe", {**QWEN, **EXPERTS, "mlp_only_layers": [0]}),
    "qwen3": ("qwen3", "Qwen3", {**QWEN, "head_dim": 6}),
    "qwen3-moe": ("qwen3_moe", "Qwen3Moe", {**QWEN3, "norm_topk_prob": True, "head_dim": 6}),
    "qwen3-moe-some-dense": ("qwen3_moe", "Qwen3Moe", {**QWEN3, "mlp_only_layers": [0], "tie_word_embeddings": True}),
    "olmoe": ("olmoe", "Olmoe", OLMOE),
    "olmoe-normalized": ("olmoe", "Olmoe", {**OLMOE, "norm_topk_prob": True, "num_key_value_heads": 4}),
    "glm4-moe": ("glm4_moe", "Glm4Moe", GLM),
    "glm4-moe-normed": ("glm4_moe", "Glm4Moe", {**GLM, "use_qk_norm": True}),
    "glm4-moe-tied-groups": (
        "glm4_moe",
        "Glm4Moe",
        {**GLM, "tie_word_embeddings": True, "n_group": 2, "routed_scaling_factor": 2.5, "first_k_dense_replace": 2},
    ),
}


def peer(name: str) -> Any:
    module, prefix, options = CASES[name]
    modeling(module)
    config = getattr(transformers, f"{prefix}Config")(**options)
    model = randomize(getattr(transformers, f"{prefix}ForCausalLM")(config))
    for buffer_name, bias in model.named_buffers():
        if buffer_name.endswith("e_score_correction_bias"):
            bias.normal_(0.0, 0.1)
    return model


class TestDecoders(Ported):
    def test_greedy_continuations_are_equal(self, pair):
        pair.check_greedy()


def test_ids_that_theirs_lack_are_copies_of_one_it_does_not_say():
    # Mixtral has no padding: our id 0 is its unknown's, id 0, as is our unknown.
    pair = Pair.of(peer("mixtral"))
    assert pair.architecture.vocabulary.theirs.tolist() == [0, 0, 1, 2, *range(3, VOCAB)]
    assert pair.architecture.vocabulary.ours.tolist() == [*range(1, VOCAB + 1)]
    # Qwen2 has one id for begin and end, no padding and no unknown: its last id stands for those.
    pair, end = Pair.of(peer("qwen2")), VOCAB - 3
    assert pair.architecture.vocabulary.theirs[:5].tolist() == [VOCAB - 1, VOCAB - 1, VOCAB - 1, end, 0]
    assert pair.architecture.transformer.start == "eos"


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe"])
def test_a_model_of_our_own_is_read_by_transformers(name, tmp_path):
    config = TransformerConfig(
        "nano",
        positions="rotary",
        norm="rms",
        norm_eps=1e-6,
        bias=False,
        qkv_bias=name == "qwen2_moe",
        tie="none",
        scale_embeddings=False,
        activation="silu",
        gated=True,
        dropout=0.0,
    )
    options: dict[str, Any] = {"num_shared_experts": 2, "shared_gate": "scale"} if name == "qwen2_moe" else {}
    moe = core.MoEConfig(4, core.TokenChoice(top_k=2), core.SwiGLU(24), **options)
    extra = {"mixtral": 1, "qwen2_moe": 2}[name]  # ids that theirs has not: padding, Qwen's unknown
    model = LanguageModel(config, vocab=VOCAB + extra, ffn=moe)
    their_class = {"mixtral": "MixtralForCausalLM", "qwen2_moe": "Qwen2MoeForCausalLM"}[name]
    pair = check_own(model, getattr(transformers, their_class), tmp_path)
    torch.testing.assert_close(*pair.logits(), rtol=1e-5, atol=2e-4)
    ids = torch.randint(2, VOCAB, (3, 8))
    torch.testing.assert_close(pair.ours(ids)[..., extra:], model(ids)[..., extra:], rtol=0, atol=0)
