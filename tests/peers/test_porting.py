"""Models of transformers as ours, and back: the same logits and texts. Versions seen: 5.24.

Theirs take norms, rotations and router scores in float32 whatever the model's dtype is. In float64 the tests let T5,
Switch, M2M-100 and NLLB-MoE have them in float64, so that a difference is one of the models. NLLB-MoE's block runs
experts 0 and 1 alone (``test_transformers_defects``), so it is given what its router asks for.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hugging import modeling, ours_TE, transformers
from ported import VOCAB, Pair, check_own, check_saved, check_way_back, double, randomize
from torch import nn

import core
from apps.nets.config import TransformerConfig
from apps.nets.transformer import LanguageModel, TranslationModel

PLAIN = {
    **{"vocab_size": VOCAB, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3},
    **{"num_attention_heads": 4, "num_key_value_heads": 2},
    "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
}
MISTRAL = {**PLAIN, "sliding_window": None}
MIXTRAL = {**MISTRAL, "num_local_experts": 4}
QWEN = {**MISTRAL, "bos_token_id": VOCAB - 3, "eos_token_id": VOCAB - 3}
FOUR = {"num_experts": 4, "num_experts_per_tok": 2}
QWEN3 = {**QWEN, **FOUR, "moe_intermediate_size": 12}
QWEN2 = {**QWEN3, "shared_expert_intermediate_size": 36}
OLMOE = {**PLAIN, **FOUR, "pad_token_id": 1, "eos_token_id": VOCAB - 5}
GLM = {
    **{**PLAIN, "rope_parameters": {**PLAIN["rope_parameters"], "partial_rotary_factor": 1.0}},
    **{"partial_rotary_factor": 1.0, "bos_token_id": 1, "eos_token_id": 2, "n_routed_experts": 4},
    **{"num_experts_per_tok": 2, "moe_intermediate_size": 12, "n_shared_experts": 2},
}
GROUPS = {"tie_word_embeddings": True, "n_group": 2, "routed_scaling_factor": 2.5, "first_k_dense_replace": 2}
M2M = {
    **{"vocab_size": VOCAB, "d_model": 16, "encoder_layers": 3, "decoder_layers": 2, "max_position_embeddings": 20},
    **{f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in (("ffn_dim", 24), ("attention_heads", 4))},
}
NLLB = {
    **{**M2M, "encoder_layers": 4, "decoder_layers": 4, "num_experts": 4, "moe_token_dropout": 0.0},
    **{"encoder_sparse_step": 2, "decoder_sparse_step": 4},  # layers 1 and 3, layer 3
}
ONE_SIDE = {"decoder_sparse_step": 0, "normalize_router_prob_before_dropping": True, "num_experts": 2}
T5 = {
    **{"vocab_size": VOCAB, "d_model": 16, "d_kv": 6, "d_ff": 24, "num_layers": 3, "num_decoder_layers": 2},
    **{"num_heads": 4, "relative_attention_max_distance": 20, "decoder_start_token_id": 0},
}
GELU = {**T5, "feed_forward_proj": "gated-gelu"}
SWITCH = {
    **{**T5, "num_layers": 4, "num_decoder_layers": 4, "num_experts": 4, "expert_capacity": 64},
    **{"num_sparse_encoder_layers": 2, "num_sparse_decoder_layers": 1},  # layers 1 and 3, layer 1
}
ALL_SPARSE = {"num_sparse_encoder_layers": 4, "num_sparse_decoder_layers": 4, "router_bias": True}
MODULES = {
    **{"M2M100": "m2m_100", "NllbMoe": "nllb_moe", "SwitchTransformers": "switch_transformers"},
    **{"Qwen2Moe": "qwen2_moe", "Qwen3Moe": "qwen3_moe", "Glm4Moe": "glm4_moe"},
}
"""Modules whose names are not their class's prefix in small letters."""
DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral": ("Mistral", MISTRAL),
    "mistral-tied": ("Mistral", {**MISTRAL, "tie_word_embeddings": True, "head_dim": 6}),
    "mixtral": ("Mixtral", MIXTRAL),
    "mixtral-3": ("Mixtral", {**MIXTRAL, "num_experts_per_tok": 3}),
    "qwen2": ("Qwen2", QWEN),
    "qwen2-chat": ("Qwen2", {**QWEN, "eos_token_id": VOCAB - 2, "pad_token_id": VOCAB - 3}),
    "qwen2-moe": ("Qwen2Moe", QWEN2),
    "qwen2-moe-normalized": ("Qwen2Moe", {**QWEN2, "norm_topk_prob": True}),
    "qwen2-moe-some-dense": ("Qwen2Moe", {**QWEN2, "mlp_only_layers": [0]}),
    "qwen3": ("Qwen3", {**QWEN, "head_dim": 6}),
    "qwen3-moe": ("Qwen3Moe", {**QWEN3, "norm_topk_prob": True, "head_dim": 6}),
    "qwen3-moe-some-dense": ("Qwen3Moe", {**QWEN3, "mlp_only_layers": [0], "tie_word_embeddings": True}),
    "olmoe": ("Olmoe", OLMOE),
    "olmoe-normalized": ("Olmoe", {**OLMOE, "norm_topk_prob": True, "num_key_value_heads": 4}),
    "glm4-moe": ("Glm4Moe", GLM),
    "glm4-moe-normed": ("Glm4Moe", {**GLM, "use_qk_norm": True}),
    "glm4-moe-tied-groups": ("Glm4Moe", {**GLM, **GROUPS}),
}
TRANSLATORS: dict[str, tuple[str, dict[str, Any]]] = {
    "m2m": ("M2M100", M2M),
    "m2m-gelu": ("M2M100", {**M2M, "activation_function": "gelu", "scale_embedding": False}),
    "nllb": ("NllbMoe", NLLB),
    "nllb-masked": ("NllbMoe", {**NLLB, "moe_token_dropout": 0.2, "router_bias": True}),
    "nllb-one-side": ("NllbMoe", {**NLLB, **ONE_SIDE}),
    "t5": ("T5", T5),
    "t5-v1.1": ("T5", {**GELU, "tie_word_embeddings": False}),
    "mt5": ("MT5", GELU),
    "switch": ("SwitchTransformers", SWITCH),
    "switch-all-layers": ("SwitchTransformers", {**SWITCH, **ALL_SPARSE}),
    "switch-untied": ("SwitchTransformers", {**SWITCH, "tie_word_embeddings": False}),
}
CASES = {**DECODERS, **TRANSLATORS}
SAME_FILES = {"mixtral-3", "qwen2-chat", "qwen2-moe-normalized", "qwen2-moe-some-dense", "olmoe-normalized", "m2m-gelu"}
SAME_FILES |= {"nllb-masked", "nllb-one-side", "glm4-moe-normed", "qwen3"}
"""Models whose files are written and read as those of another one."""


def peer(name: str, **more: Any) -> Any:
    prefix, options = CASES[name]
    modeling(MODULES.get(prefix, prefix.lower()))
    kind = f"{prefix}ForCausalLM" if name in DECODERS else f"{prefix}ForConditionalGeneration"
    model = getattr(transformers, kind)(getattr(transformers, f"{prefix}Config")(**options, **more))
    if name in ("t5-v1.1", "mt5"):
        # Published ones have an output of their own, whatever the configuration is made to say of it.
        model.lm_head.weight = nn.Parameter(torch.empty(VOCAB, 16))
    randomize(model, std=0.7 if prefix in ("M2M100", "NllbMoe") else 0.4)
    if name == "switch-untied":
        # `shared` is not read in their forward; ours writes the encoder's.
        model.shared.weight.data.copy_(model.encoder.embed_tokens.weight)
    for buffer_name, bias in model.named_buffers():
        if buffer_name.endswith("e_score_correction_bias"):
            bias.normal_(0.0, 0.1)
    return model


@pytest.fixture
def mended(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let an ``NllbMoeSparseMLP`` compute in evaluation what it is to compute."""

    def right_block(self: Any, x_BSD: torch.Tensor, padding_mask: Any = None) -> torch.Tensor:
        x_TD = x_BSD.flatten(0, 1)
        gates_TE = self.router(x_TD, padding_mask)[1]
        outputs_ETD = torch.stack([self.experts[f"expert_{e}"](x_TD) for e in range(self.num_experts)])
        y_TD = torch.einsum("te,etd->td", gates_TE, outputs_ETD) * (1 - self.experts.moe_token_dropout)
        return y_TD.view_as(x_BSD)

    monkeypatch.setattr(modeling("nllb_moe").NllbMoeSparseMLP, "forward", right_block)


@pytest.fixture
def norms_in_double(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, prefix in (("t5", "T5"), ("mt5", "MT5"), ("switch_transformers", "SwitchTransformers")):
        norm = getattr(modeling(module), f"{prefix}LayerNorm")
        monkeypatch.setattr(
            norm, "forward", lambda self, x: F.rms_norm(x, x.shape[-1:], self.weight, self.variance_epsilon)
        )


@pytest.mark.usefixtures("mended")
@pytest.mark.parametrize("name", CASES)
def test_logits_are_equal_and_either_reads_what_the_other_saves(name, tmp_path):
    pair = Pair.of(peer(name))
    theirs, ours = pair.logits()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-4)
    check_way_back(pair)
    if name not in SAME_FILES:
        check_saved(pair, tmp_path)


@pytest.mark.parametrize("name", DECODERS)
def test_greedy_continuations_are_equal(name):
    Pair.of(peer(name)).check_greedy()


@pytest.mark.usefixtures("mended", "norms_in_double")
@pytest.mark.parametrize("name", TRANSLATORS)
def test_logits_and_greedy_translations_are_equal_in_double(name):
    pair = Pair.of(double(peer(name)))
    theirs, ours = pair.logits()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
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


def test_their_nllb_block_is_another_model():
    theirs, ours = Pair.of(double(peer("nllb"))).logits()
    if torch.allclose(theirs, ours):
        pytest.skip("NLLB-MoE block: the installed version runs all experts")
    assert (ours - theirs).abs().max() > 0.1


@pytest.mark.parametrize("before", [True, False])
@torch.no_grad()
def test_gates_are_normalized_before_or_after_drops_as_the_configuration_says(before):
    # Each of 4 experts takes 2 * 16 / 4 = 8 pairs of 16 tokens: a factor of 1, where the published one drops none.
    pair = Pair.of(peer("nllb", normalize_router_prob_before_dropping=before))
    theirs = pair.theirs.model.encoder.layers[1].ffn.router
    theirs.moe_eval_capacity_token_fraction, theirs.expert_capacity = -1.0, None
    x = torch.randn(1, 16, 16) + 0.5  # so that some experts are full
    with core.set_capacity_factor(pair.ours, 1.0):
        routing = pair.ours.encoder.layers[1].ffn.router(x)
    their_gates_TE = theirs(x[0])[1]
    assert (their_gates_TE > 0).sum() < 32
    torch.testing.assert_close(ours_TE(routing, 4), their_gates_TE)


@torch.no_grad()
def test_a_long_source_has_the_positions_of_m2m():
    # 30 tokens, where the table was made for 20.
    pair = Pair.of(double(peer("m2m")))
    ids = torch.randint(4, VOCAB, (1, 30))
    theirs = pair.theirs(input_ids=ids, decoder_input_ids=ids).logits
    ours = pair.ours(pair.our_ids(ids), pair.our_ids(ids))[..., pair.architecture.vocabulary.ours]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_experts_take_all_tokens_where_those_of_switch_drop_by_capacity():
    # With room for one token of a sequence an expert, theirs leaves tokens out: ours is the model without a limit.
    pair = Pair.of(peer("switch"))
    for capacity, is_same in ((1, False), (9, True)):
        for module in pair.theirs.modules():
            if hasattr(module, "expert_capacity"):
                module.expert_capacity = capacity
        torch.manual_seed(1)
        theirs, ours = pair.logits()
        if is_same:
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-4)
        else:
            assert (ours - theirs).abs().max() > 1e-3


TOP2 = core.TokenChoice(top_k=2)
BARE = {"bias": False, "scale_embeddings": False, "norm": "rms", "dropout": 0.0}
LLAMA = {**BARE, "positions": "rotary", "norm_eps": 1e-6, "tie": "none", "activation": "silu", "gated": True}
FAIR = {"position_offset": 2, "dropout": 0.0}
RELATIVE = {**BARE, "positions": "relative", "attention_scale": 1.0, "logits_scale": 0.125}  # 64 ** -0.5
SHARED = core.MoEConfig(4, TOP2, core.SwiGLU(24), num_shared_experts=2, shared_gate="scale")
RELU = core.FFN(128, "relu", bias=True)
SWITCHED = core.MoEConfig(4, core.TokenChoice(top_k=1), core.FFN(128, "relu"))


@pytest.mark.usefixtures("mended")
@pytest.mark.parametrize(
    ("kind", "config", "moe", "extra", "close"),
    [
        # Ids that theirs has not: padding; Qwen's unknown too.
        ("MixtralForCausalLM", LLAMA, core.MoEConfig(4, TOP2, core.SwiGLU(24)), 1, 0.0),
        ("Qwen2MoeForCausalLM", {**LLAMA, "qkv_bias": True}, SHARED, 2, 0.0),
        ("NllbMoeForConditionalGeneration", {**FAIR, "start": "bos"}, core.MoEConfig(4, TOP2, RELU), 0, 0.0),
        ("NllbMoeForConditionalGeneration", {**FAIR, "start": "eos"}, core.MoEConfig(4, TOP2, RELU), 0, 0.0),
        # As in configs/nlp: dense FFNs of 128, experts of 64 without biases; zeros fill them up.
        ("NllbMoeForConditionalGeneration", FAIR, core.MoEConfig(4, TOP2, core.FFN(64, "relu")), 0, 2e-5),
        # Theirs starts with padding, and has no id for that beside it.
        ("SwitchTransformersForConditionalGeneration", RELATIVE, SWITCHED, 1, 0.0),
    ],
)
def test_a_model_of_our_own_is_read_by_transformers(kind, config, moe, extra, close, tmp_path):
    transformer, vocab = TransformerConfig("nano", **config), VOCAB + extra
    if kind.endswith("CausalLM"):
        model = LanguageModel(transformer, vocab=vocab, ffn=moe)
    else:
        own = {"decoder_moe_blocks": "none"} if kind.startswith("Switch") else {}
        model = TranslationModel(transformer, source_vocab=vocab, ffn=moe, **own)
    pair = check_own(model, getattr(transformers, kind), tmp_path)
    assert pair.theirs.config.vocab_size == VOCAB
    if kind.startswith("Nllb"):
        assert pair.theirs.config.decoder_start_token_id == {"bos": 0, "eos": 2}[config.get("start", "bos")]
    known = 3 if kind.startswith("Switch") else extra
    ids = [torch.randint(4, VOCAB, (3, 8))] * (1 if kind.endswith("CausalLM") else 2)
    torch.testing.assert_close(pair.ours(*ids)[..., known:], model(*ids)[..., known:], rtol=close / 2, atol=close)
