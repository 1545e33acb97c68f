"""Models of every family are saved in its layout and loaded again; ``tests/peers`` has equality with transformers."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from places import ROOT
from published_models import MODELS, NLLB, VOCAB, same_weights, switch_model
from torch.testing import assert_close

import core
from apps.base.quiet import quiet
from apps.cli.train import build
from apps.data.subwords import EOS_ID, SubwordConfig, train_subwords
from apps.nets.config import TransformerConfig
from apps.nets.transformer import TranslationModel
from apps.nlp.language.data import TextData
from apps.nlp.text_to_text.data import TextToTextData
from apps.nlp.translation.data import TranslationData
from apps.porting import (
    config_of,
    from_published,
    load_pretrained,
    load_pretrained_weights,
    save_pretrained,
    to_published,
)

UNPUBLISHED = {"debian_synopsis": "copy=True", "text_to_sql": "copy=True", "domains": "router Domain"}
"""Configurations whose models no published layout can hold, and why."""
CONFIGS = sorted((ROOT / "configs" / "nlp").glob("*.yaml"))


@pytest.mark.parametrize("name", MODELS)
def test_a_model_saved_and_loaded_is_the_same(name, tmp_path):
    model = MODELS[name]()
    save_pretrained(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == name
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    first = load_pretrained(tmp_path)  # rows of ids that theirs lack are copies now
    save_pretrained(first, tmp_path / "again", like=tmp_path)
    assert same_weights(load_pretrained(tmp_path / "again"), first)
    assert config_of(tmp_path / "again") == config_of(tmp_path)

    weights, loaded = model.state_dict(), first.state_dict()
    embeddings = {"source_embed.weight", "embed.weight", "output.weight"}
    assert weights.keys() == loaded.keys()
    for name in weights.keys() - embeddings:
        assert torch.equal(weights[name], loaded[name])
    for name in weights.keys() & embeddings:
        assert torch.equal(weights[name][EOS_ID:], loaded[name][EOS_ID:])


@pytest.mark.parametrize("conversion", ["prune", "merge", "densify"])
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "glm4_moe", "switch_transformers", "nllb-moe"])
def test_a_model_that_was_converted_in_memory_is_saved_as_it_is(name, conversion, tmp_path):
    model, ids = MODELS[name]().eval(), torch.randint(EOS_ID, VOCAB, (3, 9))
    inputs = (ids, ids) if isinstance(model, TranslationModel) else (ids,)
    statistics = core.expert_statistics(model, [inputs], run=lambda model, inputs: model(*inputs), every_token=True)
    if conversion == "densify":  # Qwen's and GLM's first layer is dense, of another width
        core.densify(model, "use", {layer: s.loads_E for layer, s in statistics.items()})
    else:
        (core.prune_experts if conversion == "prune" else core.merge_experts)(model, statistics, 3)
    save_pretrained(model, tmp_path)
    loaded = load_pretrained(tmp_path).eval()
    assert [moe.num_experts for moe in loaded.moes] == ([] if conversion == "densify" else [3])
    with torch.no_grad():
        assert_close(loaded(*inputs)[..., EOS_ID:], model(*inputs)[..., EOS_ID:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_model_of_each_configuration_is_saved_in_a_published_layout_with_equal_logits(path, tmp_path, monkeypatch):
    texts, tags = (
        (["a dog runs"], ["ein Hund läuft"]),
        ["en", "de", "fr", "es"] if path.stem == "bible_six_pairs" else [],
    )
    subwords = train_subwords(*texts, SubwordConfig(vocab_size=300), tags)
    for kind in (TranslationData, TextToTextData, TextData):
        monkeypatch.setattr(kind, "subwords", subwords)
    monkeypatch.setattr(TextToTextData, "tasks", ("a",))
    monkeypatch.chdir(tmp_path)
    with quiet():
        flags = ["--model.transformer.dim", "32", "--trainer.accelerator", "cpu", "--trainer.precision", "32-true"]
        flags += ["--model.transformer.position_offset", "2"] * ("copy" in UNPUBLISHED.get(path.stem, ""))
        module = build("fit", ["--config", str(path), *flags]).model
    model = module.model.double().eval()
    for weight in (*model.parameters(), *(b for n, b in model.named_buffers() if n.endswith("expert_bias"))):
        weight.data += 0.1 * torch.randn_like(weight)  # no weight at its start, such as a bias of 0
    if path.stem in UNPUBLISHED:
        with pytest.raises(ValueError, match=f"{UNPUBLISHED[path.stem]} cannot be said in "):
            save_pretrained(model, tmp_path / "published")
        return
    save_pretrained(model, tmp_path / "published")
    loaded = load_pretrained(tmp_path / "published", torch.float64).eval()
    ids_BL = torch.randint(EOS_ID, subwords.size("source"), (3, 9))
    inputs = (ids_BL, ids_BL) if isinstance(model, TranslationModel) else (ids_BL,)
    with torch.no_grad():
        assert_close(loaded(*inputs)[..., EOS_ID:], model(*inputs)[..., EOS_ID:], rtol=0, atol=1e-12)


def test_narrow_experts_are_padded_with_zeros_and_biases_of_zero():
    """Experts of 2 hidden units beside dense FFNs of 3 get a third one of zeros, and the dense layer stays."""
    config = replace(NLLB, dim=4, num_heads=2, hidden_dim=3, encoder_layers=2, decoder_layers=1)
    moe = core.MoEConfig(2, core.TokenChoice(top_k=2), core.FFN(2, "relu"))
    model = TranslationModel(config, source_vocab=VOCAB, ffn=moe, encoder_moe_blocks=[1], decoder_moe_blocks="none")
    written, tensors = to_published(model)
    assert written["encoder_ffn_dim"] == written["decoder_ffn_dim"] == 3
    w_in, w_out = (getattr(model.encoder.layers[1].ffn.experts, name)[1].mT for name in ("w_in", "w_out"))
    expert = "model.encoder.layers.1.ffn.experts.expert_1"
    assert torch.equal(tensors[f"{expert}.fc1.weight"], torch.cat((w_in, torch.zeros(1, 4))))
    assert torch.equal(tensors[f"{expert}.fc2.weight"], torch.cat((w_out, torch.zeros(4, 1)), 1))
    assert tensors[f"{expert}.fc1.bias"].tolist() == [0.0] * 3
    assert tensors[f"{expert}.fc2.bias"].tolist() == [0.0] * 4
    dense = model.encoder.layers[0].ffn
    assert torch.equal(tensors["model.encoder.layers.0.ffn.fc1.weight"], dense.w_in.weight)
    # And the other way about: dense FFNs of 3 beside experts of 5.
    wide = core.MoEConfig(2, core.TokenChoice(top_k=2), core.FFN(5, "relu", bias=True))
    model = TranslationModel(config, source_vocab=VOCAB, ffn=wide, encoder_moe_blocks=[1], decoder_moe_blocks="none")
    written, tensors = to_published(model)
    dense = model.decoder.layers[0].ffn
    assert written["decoder_ffn_dim"] == 5
    assert torch.equal(tensors["model.decoder.layers.0.ffn.fc2.weight"][:, :3], dense.w_out.weight)
    assert not tensors["model.decoder.layers.0.ffn.fc2.weight"][:, 3:].any()
    assert tensors["model.decoder.layers.0.ffn.fc1.bias"].tolist() == [*dense.w_in.bias.tolist(), 0.0, 0.0]


def test_glm_s_partial_rotations_are_refused():
    config, _ = to_published(MODELS["glm4_moe"]())
    partial = {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}
    with pytest.raises(ValueError, match=r"^partial_rotary_factor=0.5"):
        from_published({**config, **partial}, {})


def test_a_model_takes_the_dtype_that_is_asked_for(tmp_path):
    save_pretrained(switch_model().double(), tmp_path)
    assert config_of(tmp_path).model_type == "switch_transformers"
    assert {t.dtype for t in load_pretrained(tmp_path).parameters()} == {torch.float32}
    assert {t.dtype for t in load_pretrained(tmp_path, torch.float64).parameters()} == {torch.float64}
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float64"


def test_options_build_the_model_again(tmp_path):
    save_pretrained(switch_model(encoder_moe_blocks="none"), tmp_path)
    options = config_of(tmp_path).options()
    assert options["encoder_moe_blocks"] == "none"
    assert options["decoder_moe_blocks"] == [1]
    model = TranslationModel(
        TransformerConfig(**options["transformer"]),
        source_vocab=VOCAB,
        ffn=core.MoEConfig.from_dict(options["moe"]),
        encoder_moe_blocks=options["encoder_moe_blocks"],
        decoder_moe_blocks=options["decoder_moe_blocks"],
    )
    load_pretrained_weights(model, tmp_path)
    assert same_weights(model, load_pretrained(tmp_path))
