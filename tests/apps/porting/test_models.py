"""Models of every family are saved in its layout and loaded again; ``tests/peers`` has equality with transformers."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from places import ROOT
from published_models import MODELS, NLLB, VOCAB, same_weights, switch_model, two_of_four
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
    load_pretrained,
    load_pretrained_weights,
    mixtral,
    nllb,
    save_pretrained,
    switch,
    to_published,
)
from apps.porting.parts import cut, joined, stacked

UNPUBLISHED = {"debian_synopsis": "copy=True", "text_to_sql": "copy=True", "domains": "router Domain"}
"""Configurations whose models no published layout can hold, and why."""
CONFIGS = sorted((ROOT / "configs" / "nlp").glob("*.yaml"))
QUICK = ("bible_six_pairs", "text_deepseek_like", "text_mixtral_like")


def ids_for(model, vocab):
    ids_BL = torch.randint(EOS_ID, vocab, (3, 9))
    return (ids_BL, ids_BL) if isinstance(model, TranslationModel) else (ids_BL,)


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


@pytest.mark.parametrize(
    ("name", "conversion"),
    [
        *((name, "densify") for name in ("mixtral", "qwen3_moe", "glm4_moe", "switch_transformers", "nllb-moe")),
        *(("qwen3_moe", "prune"), ("switch_transformers", "merge"), ("nllb-moe", "prune"), ("mixtral", "merge")),
    ],
)
def test_a_model_that_was_converted_in_memory_is_saved_as_it_is(name, conversion, tmp_path):
    model = MODELS[name]().eval()
    inputs = ids_for(model, VOCAB)
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


@pytest.mark.parametrize(
    "path", [pytest.param(p, marks=() if p.stem in QUICK else pytest.mark.slow, id=p.stem) for p in CONFIGS]
)
def test_a_model_of_each_configuration_is_saved_in_a_published_layout_with_equal_logits(path, tmp_path, monkeypatch):
    tags = ["en", "de", "fr", "es"] if path.stem == "bible_six_pairs" else []
    subwords = train_subwords(["a dog runs"], ["ein Hund läuft"], SubwordConfig(vocab_size=300), tags)
    for kind in (TranslationData, TextToTextData, TextData):
        monkeypatch.setattr(kind, "subwords", subwords)
    monkeypatch.setattr(TextToTextData, "tasks", ("a",))
    monkeypatch.chdir(tmp_path)
    with quiet():
        flags = ["--model.transformer.dim", "32", "--trainer.accelerator", "cpu", "--trainer.precision", "32-true"]
        flags += ["--model.transformer.position_offset", "2"] * ("copy" in UNPUBLISHED.get(path.stem, ""))
        model = build("fit", ["--config", str(path), *flags]).model.model.double().eval()
    for weight in (*model.parameters(), *(b for n, b in model.named_buffers() if n.endswith("expert_bias"))):
        weight.data += 0.1 * torch.randn_like(weight)  # no weight at its start, such as a bias of 0
    if path.stem in UNPUBLISHED:
        with pytest.raises(ValueError, match=f"{UNPUBLISHED[path.stem]} cannot be said in "):
            save_pretrained(model, tmp_path / "published")
        return
    save_pretrained(model, tmp_path / "published")
    loaded, inputs = (
        load_pretrained(tmp_path / "published", torch.float64).eval(),
        ids_for(model, subwords.size("source")),
    )
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
    assert [tensors[f"{expert}.fc{i}.bias"].tolist() for i in (1, 2)] == [[0.0] * 3, [0.0] * 4]
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


def test_a_model_takes_the_dtype_that_is_asked_for(tmp_path):
    save_pretrained(switch_model().double(), tmp_path)
    assert config_of(tmp_path).model_type == "switch_transformers"
    for asked, dtype in (((), torch.float32), ((torch.float64,), torch.float64)):
        assert {t.dtype for t in load_pretrained(tmp_path, *asked).parameters()} == {dtype}
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float64"


def test_options_build_the_model_again(tmp_path):
    save_pretrained(switch_model(encoder_moe_blocks="none"), tmp_path)
    options = config_of(tmp_path).options()
    blocks = {name: options[name] for name in ("encoder_moe_blocks", "decoder_moe_blocks")}
    assert blocks == {"encoder_moe_blocks": "none", "decoder_moe_blocks": [1]}
    config, moe = TransformerConfig(**options["transformer"]), core.MoEConfig.from_dict(options["moe"])
    model = TranslationModel(config, source_vocab=VOCAB, ffn=moe, **blocks)
    load_pretrained_weights(model, tmp_path)
    assert same_weights(model, load_pretrained(tmp_path))


def test_layouts_lead_there_and_back():
    q, k = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[5.0, 6.0]])
    part = joined("qk", ["q", "k"], [2, 1])
    assert part.join([q, k]).tolist() == [[1, 2], [3, 4], [5, 6]]
    assert [t.tolist() for t in part.split(part.join([q, k]))] == [q.tolist(), k.tolist()]

    # Two experts of 2 inputs and 1 hidden unit: theirs (F, D), ours (E, D, F).
    part = stacked("w_in", ["a", "b"])
    assert part.join([torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0]])]).tolist() == [[[1], [2]], [[3], [4]]]
    assert part.split(torch.tensor([[[1.0], [2.0]], [[3.0], [4.0]]]))[1].tolist() == [[3, 4]]

    # A wide FFN of 4 hidden units on 1 input as two experts of 2: w_in (4, 1) and w_out (1, 4).
    part = cut("w_in", "up", 2, dim=0)
    assert part.join([torch.tensor([[1.0], [2.0], [3.0], [4.0]])]).tolist() == [[[1, 2]], [[3, 4]]]
    part = cut("w_out", "down", 2, dim=1)
    ours = part.join([torch.tensor([[1.0, 2.0, 3.0, 4.0]])])
    assert ours.tolist() == [[[1], [2]], [[3], [4]]]
    assert part.split(ours)[0].tolist() == [[1, 2, 3, 4]]


def test_which_layers_have_experts():
    # Switch: index 1 modulo the step. NLLB: the last of each step.
    given = ((2, 6), (3, 6), (1, 3), (0, 6))
    assert [switch.sparse_layers(*one) for one in given] == [(1, 3, 5), (1, 4), (0, 1, 2), ()]
    assert [nllb.sparse_layers(*one) for one in ((4, 8), (0, 8))] == [(3, 7), ()]


def test_experts_held_in_two_tensors_are_taken_apart():
    # Gate and up, (E, 2F, D) with E = 2, F = 1, D = 1, and down, (E, D, F). Mixtral has no norm of queries.
    fused = {
        "model.layers.0.mlp.experts.gate_up_proj": torch.tensor([[[1.0], [2.0]], [[3.0], [4.0]]]),
        "model.layers.0.mlp.experts.down_proj": torch.tensor([[[5.0]], [[6.0]]]),
        "model.layers.0.mlp.gate.weight": torch.tensor([[7.0], [8.0]]),
    }
    block, found = "model.layers.0.block_sparse_moe.", mixtral.published(fused).items()
    assert {name.removeprefix(block).removesuffix(".weight"): t.flatten().tolist() for name, t in found} == {
        **{"experts.0.w1": [1], "experts.0.w3": [2], "experts.0.w2": [5]},
        **{"experts.1.w1": [3], "experts.1.w3": [4], "experts.1.w2": [6]},
        "gate": [7, 8],
    }
    norm = {"model.layers.0.self_attn.q_norm.weight": torch.ones(2)}
    names = {name.rpartition("experts.1.")[2] for name in mixtral.published(fused | norm) if "experts.1." in name}
    assert names == {"gate_proj.weight", "up_proj.weight", "down_proj.weight"}


def test_masked_expert_outputs_of_nllb_are_made_up_for():
    # Theirs computes 0.8 of the sum in evaluation. Ours divides what is kept in training by 0.8: with gates of 0.8 that
    # is the plain sum of what is kept, as in their training.
    config, _ = to_published(TranslationModel(NLLB, source_vocab=VOCAB, ffn=two_of_four()))
    assert config["moe_token_dropout"] == 0.0
    read = nllb.read({**config, "moe_token_dropout": 0.2}, {}).moe
    assert read is not None
    assert (read.router.scale, read.expert_output_masking) == (0.8, 0.2)
