"""M2M-100 and NLLB-MoE of transformers as our models, and back: the same logits and translations. Versions seen: 5.24.

Their MoE block runs experts 0 and 1 alone (``test_transformers_defects``), so the tests give it what its router asks
for: the sum of the experts' outputs weighted by the router's gates.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hugging import ours_TE
from ported import VOCAB, Pair, PortedInDouble, check_own, double, modeling, randomize

import core
from apps.nets.config import TransformerConfig
from apps.nets.transformer import TranslationModel

transformers = pytest.importorskip("transformers", minversion="5.0")

M2M = {
    "vocab_size": VOCAB,
    "d_model": 16,
    "encoder_layers": 3,
    "decoder_layers": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "max_position_embeddings": 20,
}
NLLB = {
    **M2M,
    "encoder_layers": 4,
    "decoder_layers": 4,
    "encoder_sparse_step": 2,  # layers 1 and 3
    "decoder_sparse_step": 4,  # layer 3
    "num_experts": 4,
    "moe_token_dropout": 0.0,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "m2m": ("M2M100", M2M),
    "m2m-gelu": ("M2M100", {**M2M, "activation_function": "gelu", "scale_embedding": False}),
    "nllb": ("NllbMoe", NLLB),
    "nllb-masked": ("NllbMoe", {**NLLB, "moe_token_dropout": 0.2, "router_bias": True}),
    "nllb-one-side": (
        "NllbMoe",
        {**NLLB, "decoder_sparse_step": 0, "normalize_router_prob_before_dropping": True, "num_experts": 2},
    ),
}


def peer(name: str) -> Any:
    prefix, options = CASES[name]
    modeling("m2m_100" if prefix == "M2M100" else "nllb_moe")
    config = getattr(transformers, f"{prefix}Config")(**options)
    return randomize(getattr(transformers, f"{prefix}ForConditionalGeneration")(config), std=0.7)


def right_block(self: Any, x_BSD: torch.Tensor, padding_mask: Any = None) -> torch.Tensor:
    """Return what an ``NllbMoeSparseMLP`` is to compute in evaluation."""
    x_TD = x_BSD.flatten(0, 1)
    gates_TE = self.router(x_TD, padding_mask)[1]
    outputs_ETD = torch.stack([self.experts[f"expert_{e}"](x_TD) for e in range(self.num_experts)])
    y_TD = torch.einsum("te,etd->td", gates_TE, outputs_ETD) * (1 - self.experts.moe_token_dropout)
    return y_TD.view_as(x_BSD)


@pytest.fixture
def all_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modeling("nllb_moe").NllbMoeSparseMLP, "forward", right_block)


@pytest.mark.usefixtures("all_experts")
class TestNllb(PortedInDouble):
    pass


def test_their_block_is_another_model():
    theirs, ours = Pair.of(double(peer("nllb"))).logits()
    if torch.allclose(theirs, ours):
        pytest.skip("NLLB-MoE block: the installed version runs all experts")
    assert (ours - theirs).abs().max() > 0.1


@pytest.mark.parametrize("before", [True, False])
@torch.no_grad()
def test_gates_are_normalized_before_or_after_drops_as_the_configuration_says(before):
    # Each of 4 experts takes 2 * 16 / 4 = 8 pairs of 16 tokens: a factor of 1, where the published one drops none.
    config = transformers.NllbMoeConfig(**NLLB, normalize_router_prob_before_dropping=before)
    pair = Pair.of(randomize(transformers.NllbMoeForConditionalGeneration(config), std=0.7))
    theirs = pair.theirs.model.encoder.layers[1].ffn.router
    theirs.moe_eval_capacity_token_fraction, theirs.expert_capacity = -1.0, None
    x = torch.randn(1, 16, 16) + 0.5  # so that some experts are full
    with core.set_capacity_factor(pair.ours, 1.0):
        routing = pair.ours.encoder.layers[1].ffn.router(x)
    their_gates_TE = theirs(x[0])[1]
    assert (their_gates_TE > 0).sum() < 32
    torch.testing.assert_close(ours_TE(routing, 4), their_gates_TE)


@pytest.mark.usefixtures("all_experts")
def test_a_long_source_has_the_positions_of_theirs():
    # 30 tokens, where the table was made for 20.
    pair = Pair.of(double(peer("m2m")))
    ids = torch.randint(4, VOCAB, (1, 30))
    with torch.no_grad():
        theirs = pair.theirs(input_ids=ids, decoder_input_ids=ids).logits
        ours = pair.ours(pair.our_ids(ids), pair.our_ids(ids))[..., pair.architecture.vocabulary.ours]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.usefixtures("all_experts")
@pytest.mark.parametrize("start", ["bos", "eos"])
def test_a_model_of_our_own_is_read_by_transformers(start, tmp_path):
    config = TransformerConfig("nano", position_offset=2, start=start, dropout=0.0)
    moe = core.MoEConfig(4, core.TokenChoice(top_k=2), core.FFN(128, "relu", bias=True))
    model = TranslationModel(config, source_vocab=VOCAB, ffn=moe)
    pair = check_own(model, transformers.NllbMoeForConditionalGeneration, tmp_path)
    assert pair.theirs.config.decoder_start_token_id == {"bos": 0, "eos": 2}[start]
    torch.testing.assert_close(*pair.logits(), rtol=1e-5, atol=2e-4)
    ids = torch.randint(2, VOCAB, (3, 8))
    torch.testing.assert_close(pair.ours(ids, ids), model(ids, ids), rtol=0, atol=0)


@pytest.mark.usefixtures("all_experts")
def test_narrow_experts_without_biases_are_read_by_transformers(tmp_path):
    # As in configs/nlp: dense FFNs of 128, experts of 64; zeros fill them up.
    config = TransformerConfig("nano", position_offset=2, dropout=0.0)
    moe = core.MoEConfig(4, core.TokenChoice(top_k=2), core.FFN(64, "relu"))
    model = TranslationModel(config, source_vocab=VOCAB, ffn=moe)
    pair = check_own(model, transformers.NllbMoeForConditionalGeneration, tmp_path)
    torch.testing.assert_close(*pair.logits(), rtol=1e-5, atol=2e-4)
    ids = torch.randint(2, VOCAB, (3, 8))
    torch.testing.assert_close(pair.ours(ids, ids), model(ids, ids), rtol=1e-5, atol=2e-5)
