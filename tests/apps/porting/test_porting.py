"""Published checkpoints: ids, layouts, files, and what is refused. ``tests/peers`` has equality with transformers."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from places import ROOT
from published_shapes import MIXTRAL, T5
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close

import core
from apps.base.quiet import quiet
from apps.cli.train import build
from apps.data.subwords import BOS_ID, EOS_ID, SubwordConfig, train_subwords
from apps.nets.config import TransformerConfig
from apps.nets.transformer import LanguageModel, TranslationModel
from apps.nlp.language.data import TextData
from apps.nlp.translation.data import TranslationData
from apps.porting import (
    FAMILIES,
    Vocabulary,
    config_of,
    from_published,
    load_pretrained,
    load_pretrained_weights,
    mixtral,
    nllb,
    save_pretrained,
    subwords_of,
    switch,
    to_published,
)
from apps.porting.parts import cut, joined, stacked

NLLB = TransformerConfig("nano", position_offset=2, dropout=0.0)
EXPERTS = core.MoEConfig(4, core.TokenChoice(top_k=1), core.FFN(128, "relu"))
VOCAB = 30
CONFIGS = sorted((ROOT / "configs" / "nlp").glob("*.yaml"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def switch_model(config: TransformerConfig = T5, **options: Any) -> TranslationModel:
    tied = replace(config, tie="all", logits_scale=config.shape.dim**-0.5)
    return TranslationModel(tied, source_vocab=VOCAB, **{"ffn": EXPERTS, **options}).eval()


def same_weights(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    theirs = b.state_dict()
    return a.state_dict().keys() == theirs.keys() and all(torch.equal(t, theirs[n]) for n, t in a.state_dict().items())


# ---------------------------------------------------------------------------------------------------------------------
# Ids
# ---------------------------------------------------------------------------------------------------------------------


def test_specials_come_first_and_the_others_keep_their_order():
    # fairseq: begin 0, padding 1, end 2, unknown 3.
    vocabulary = Vocabulary(6, pad=1, unk=3, bos=0, eos=2, spare=1)
    assert vocabulary.theirs.tolist() == [1, 3, 0, 2, 4, 5]
    assert vocabulary.ours.tolist() == [2, 0, 3, 1, 4, 5]
    assert vocabulary.our_size == 6


def test_a_special_that_they_lack_is_a_row_more():
    # T5: padding 0, end 1, unknown 2, and no begin: a copy of padding, with which their decoder starts. The way back
    # takes that copy, which is what was read.
    vocabulary = Vocabulary(5, pad=0, unk=2, bos=None, eos=1, spare=0)
    assert vocabulary.theirs.tolist() == [0, 2, 0, 1, 3, 4]
    assert vocabulary.ours.tolist() == [2, 3, 1, 4, 5]
    assert vocabulary.resized(9) == Vocabulary(8, pad=0, unk=2, bos=None, eos=1, spare=0)


def test_ids_that_cannot_be():
    with pytest.raises(ValueError, match=r"^the id 5 of eos is not in a vocabulary of vocab_size=5$"):
        Vocabulary(5, pad=0, unk=2, bos=None, eos=5, spare=0)
    with pytest.raises(ValueError, match=r"one stands for two$"):
        Vocabulary(5, pad=0, unk=2, bos=0, eos=1, spare=0)


def test_a_decoder_may_start_from_the_end():
    # With start="eos" the decoder reads BOS_ID as EOS_ID, in a whole sequence and step by step, and says other logits
    # for the two all the same.
    model = TranslationModel(replace(NLLB, start="eos"), source_vocab=VOCAB).eval()
    source_BS, target_BL = torch.randint(4, VOCAB, (2, 5)), torch.randint(4, VOCAB, (2, 4))
    target_BL[:, 0] = BOS_ID
    ended_BL = target_BL.clone()
    ended_BL[:, 0] = EOS_ID
    logits_BLV = model(source_BS, target_BL)
    assert torch.equal(logits_BLV, model(source_BS, ended_BL))
    assert not torch.allclose(logits_BLV[..., BOS_ID], logits_BLV[..., EOS_ID])
    cache = model.start(model.encode(source_BS))
    for t in range(4):
        torch.testing.assert_close(model.step(target_BL[:, t], cache), logits_BLV[:, t])
    text = LanguageModel(replace(MIXTRAL, start="eos"), vocab=VOCAB).eval()
    assert torch.equal(text(target_BL), text(ended_BL))


# ---------------------------------------------------------------------------------------------------------------------
# Layouts
# ---------------------------------------------------------------------------------------------------------------------


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
    assert switch.sparse_layers(2, 6) == (1, 3, 5)
    assert switch.sparse_layers(3, 6) == (1, 4)
    assert switch.sparse_layers(1, 3) == (0, 1, 2)
    assert switch.sparse_layers(0, 6) == ()
    assert nllb.sparse_layers(4, 8) == (3, 7)
    assert nllb.sparse_layers(0, 8) == ()


def test_experts_held_in_two_tensors_are_taken_apart():
    # Gate and up, (E, 2F, D) with E = 2, F = 1, D = 1, and down, (E, D, F).
    fused = {
        "model.layers.0.mlp.experts.gate_up_proj": torch.tensor([[[1.0], [2.0]], [[3.0], [4.0]]]),
        "model.layers.0.mlp.experts.down_proj": torch.tensor([[[5.0]], [[6.0]]]),
        "model.layers.0.mlp.gate.weight": torch.tensor([[7.0], [8.0]]),
    }
    block = "model.layers.0.block_sparse_moe"
    assert {name: tensor.flatten().tolist() for name, tensor in mixtral.published(fused).items()} == {
        f"{block}.experts.0.w1.weight": [1],
        f"{block}.experts.0.w3.weight": [2],
        f"{block}.experts.0.w2.weight": [5],
        f"{block}.experts.1.w1.weight": [3],
        f"{block}.experts.1.w3.weight": [4],
        f"{block}.experts.1.w2.weight": [6],
        f"{block}.gate.weight": [7, 8],
    }


def test_masked_expert_outputs_of_nllb_are_made_up_for():
    # Theirs computes 0.8 of the sum in evaluation. Ours divides what is kept in training by 0.8: with gates of 0.8 that
    # is the plain sum of what is kept, as in their training.
    config, _ = to_published(TranslationModel(NLLB, source_vocab=VOCAB, ffn=two_of_four()))
    assert config["moe_token_dropout"] == 0.0
    read = nllb.read({**config, "moe_token_dropout": 0.2}, {}).moe
    assert read is not None
    assert (read.router.scale, read.expert_output_masking) == (0.8, 0.2)


def two_of_four(**options: Any) -> core.MoEConfig:
    return core.MoEConfig(4, core.TokenChoice(top_k=2), core.FFN(128, "relu", bias=True), **options)


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------

MODELS: dict[str, Callable[[], Any]] = {
    "t5": lambda: TranslationModel(T5, source_vocab=VOCAB),
    "switch_transformers": switch_model,
    "m2m_100": lambda: TranslationModel(NLLB, source_vocab=VOCAB),
    "nllb-moe": lambda: TranslationModel(NLLB, source_vocab=VOCAB, ffn=two_of_four()),
    "mistral": lambda: LanguageModel(MIXTRAL, vocab=VOCAB),
    "mixtral": lambda: LanguageModel(
        MIXTRAL, vocab=VOCAB, ffn=core.MoEConfig(4, core.TokenChoice(top_k=2), core.SwiGLU(24))
    ),
    "glm4_moe": lambda: LanguageModel(
        MIXTRAL,
        vocab=VOCAB,
        ffn=core.MoEConfig(
            4,
            core.TokenChoice(top_k=2, score_func="sigmoid", normalize=True, expert_bias=True, scale=2.5),
            core.SwiGLU(24),
            num_shared_experts=2,
        ),
        moe_blocks="last1",
    ),
}


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


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_model_of_each_configuration_is_saved_in_a_published_layout_with_equal_logits(path, tmp_path, monkeypatch):
    texts, tags = (
        (["a dog runs"], ["ein Hund läuft"]),
        ["en", "de", "fr", "es"] if path.stem == "bible_six_pairs" else [],
    )
    subwords = train_subwords(*texts, SubwordConfig(vocab_size=300), tags)
    for kind in (TranslationData, TextData):
        monkeypatch.setattr(kind, "subwords", subwords)
    monkeypatch.chdir(tmp_path)
    with quiet():
        flags = ["--model.transformer.dim", "32", "--trainer.accelerator", "cpu", "--trainer.precision", "32-true"]
        module = build("fit", ["--config", str(path), *flags]).model
    model = module.model.double().eval()
    for weight in (*model.parameters(), *(b for n, b in model.named_buffers() if n.endswith("expert_bias"))):
        weight.data += 0.1 * torch.randn_like(weight)  # no weight at its start, such as a bias of 0
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


def test_glm_s_partial_rotations_and_norms_of_queries_are_refused():
    config, _ = to_published(MODELS["glm4_moe"]())
    for change, told in (
        ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5"),
        ({"use_qk_norm": True}, "use_qk_norm=True: our models have no norms of queries and keys"),
    ):
        with pytest.raises(ValueError, match=told):
            from_published({**config, **change}, {})


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


def checkpoint(folder: Path) -> dict[str, Tensor]:
    """A Switch checkpoint in ``folder``, and its tensors."""
    save_pretrained(switch_model(), folder)
    return load_file(folder / "model.safetensors")


def test_shards_and_torch_files_are_read(tmp_path):
    tensors = checkpoint(tmp_path)
    whole = load_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()

    torch.save(tensors, tmp_path / "pytorch_model.bin")
    assert same_weights(load_pretrained(tmp_path), whole)
    (tmp_path / "pytorch_model.bin").unlink()

    names = sorted(tensors)
    halves = {"1": names[:7], "2": names[7:]}
    for kind, suffix, save in (("pytorch_model", "bin", torch.save), ("model", "safetensors", save_file)):
        for number, half in halves.items():
            save({name: tensors[name] for name in half}, tmp_path / f"{kind}-{number}.{suffix}")
        index = {name: f"{kind}-{number}.{suffix}" for number, half in halves.items() for name in half}
        (tmp_path / f"{kind}.{suffix}.index.json").write_text(json.dumps({"weight_map": index}))
        assert same_weights(load_pretrained(tmp_path), whole)
        (tmp_path / f"{kind}.{suffix}.index.json").unlink()


def test_aliases_may_be_written_out(tmp_path):
    tensors = checkpoint(tmp_path)
    whole, shared = load_pretrained(tmp_path), tensors.pop("shared.weight")
    for names in (("lm_head",), ("encoder.embed_tokens", "decoder.embed_tokens", "lm_head", "shared")):
        save_file({**tensors, **{f"{n}.weight": shared.clone() for n in names}}, tmp_path / "model.safetensors")
        assert same_weights(load_pretrained(tmp_path), whole)


def test_tensors_that_do_not_fit_are_named(tmp_path):
    tensors = checkpoint(tmp_path)

    def message(changed: dict[str, Tensor]) -> str:
        save_file(changed, tmp_path / "model.safetensors")
        with pytest.raises(ValueError) as error:
            load_pretrained(tmp_path)
        return str(error.value)

    expert = "encoder.block.1.layer.1.mlp.experts.expert_2.wi.weight"
    left = {name: tensor for name, tensor in tensors.items() if name != expert}
    assert message(left) == f"tensor {expert!r} is missing"
    assert message({**left, expert: torch.zeros(127, 64)}) == (
        f"tensor {expert!r} is of shape (127, 64), not (128, 64)"
    )
    assert message({**tensors, "lora.a": torch.zeros(1), "lora.b": torch.zeros(1)}) == (
        "tensor 'lora.a' has no place in this model, nor have 1 others"
    )
    del tensors["shared.weight"]
    assert message(tensors) == "tensor 'shared.weight' is missing"


def test_files_that_cannot_be_read(tmp_path):
    def message(**config: Any) -> str:
        if config:
            (tmp_path / "config.json").write_text(json.dumps(config))
        with pytest.raises(ValueError) as error:
            load_pretrained(tmp_path)
        assert "\n" not in str(error.value)
        return str(error.value).replace(str(tmp_path), "F")

    assert message() == "F/config.json is missing"
    assert message(model_type="t5") == "F/config.json says no vocab_size"
    assert message(model_type="bert", vocab_size=9).startswith("model_type='bert' is not one of t5, mt5, switch_")
    assert message(model_type="t5", vocab_size=9).startswith("F holds no weights: neither model.safetensors nor")
    assert message(model_type=["t5"]) == "F/config.json says model_type=['t5'], which is no name"
    assert message(model_type="t5", vocab_size="abc") == "F/config.json says vocab_size='abc', which is no whole number"
    (tmp_path / "config.json").write_text("{")
    assert message().startswith("F/config.json cannot be read: Expecting property name")
    (tmp_path / "config.json").write_text("[]")
    assert message() == "F/config.json holds no JSON object"

    known = {"model_type": "t5", "vocab_size": 9, "num_layers": 2, "d_model": 8, "d_ff": 8, "num_heads": 2}
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"shared.weight": "../secret.safetensors"}}))
    assert (
        message(**known)
        == "F/model.safetensors.index.json names '../secret.safetensors', which is no file of its folder"
    )
    index.write_text(json.dumps({"weight_map": {"lm_head.weight": "1.safetensors", "shared.weight": "1.safetensors"}}))
    assert message(**known).startswith("config.json of a t5 says no d_kv")
    assert message(**known, d_kv=4).startswith("F/1.safetensors cannot be read: No such file")
    save_file({"lm_head.weight": torch.zeros(9, 8)}, tmp_path / "1.safetensors")
    assert message(**known, d_kv=4) == (
        "F/1.safetensors does not hold tensor 'shared.weight', which the index says it does"
    )
    (tmp_path / "model.safetensors").write_bytes(b"not safetensors")
    assert message(**known, d_kv=4).startswith("F/model.safetensors cannot be read: ")


class Sly:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("this ran",))


def test_a_pickle_runs_no_code(tmp_path, capsys):
    config, _ = to_published(switch_model())
    (tmp_path / "config.json").write_text(json.dumps(config))
    path = tmp_path / "pytorch_model.bin"
    torch.save({"shared.weight": Sly()}, path)
    with pytest.raises(ValueError, match=r"pytorch_model.bin holds more than tensors, and is not read$"):
        load_pretrained(tmp_path)
    path.write_bytes(pickle.dumps(Sly(), protocol=2))
    with pytest.raises(ValueError, match=r"^[^\n]*pytorch_model.bin [^\n]*$"):
        load_pretrained(tmp_path)
    torch.save([torch.zeros(1)], path)
    with pytest.raises(ValueError, match=r"pytorch_model.bin holds no tensors by name$"):
        load_pretrained(tmp_path)
    assert capsys.readouterr().out == ""


def sentencepiece_file(path: Path, **options: Any) -> Any:
    """A sentencepiece model of a few words, written to ``path``, and its processor."""
    from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

    words = ["a dog runs", "a cat sleeps", "the dog sleeps", "the cat runs fast", "dogs and cats"]
    with path.open("wb") as file:
        SentencePieceTrainer.train(
            sentence_iterator=iter(words * 4),
            model_writer=file,
            vocab_size=40,
            hard_vocab_limit=False,
            minloglevel=2,
            **options,
        )
    return SentencePieceProcessor(model_file=str(path))


@pytest.mark.parametrize("kind", ["t5", "mistral"])
def test_subwords_have_our_ids(kind, tmp_path):
    layouts = {
        "t5": ("spiece.model", {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, "model_type": "unigram"}),
        "mistral": ("tokenizer.model", {"unk_id": 0, "bos_id": 1, "eos_id": 2, "model_type": "bpe"}),
    }
    name, options = layouts[kind]
    theirs = sentencepiece_file(tmp_path / name, **options)
    size = theirs.vocab_size() + 5  # as T5's, with ids that are no subwords
    config = {"model_type": kind, "vocab_size": size, "pad_token_id": 0, "eos_token_id": 1}
    if kind == "mistral":
        config = {"model_type": kind, "vocab_size": size, "bos_token_id": 1, "eos_token_id": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    subwords = subwords_of(tmp_path)
    assert subwords.size("source") == size + 1  # T5 has no begin, Mistral no padding
    vocabulary = FAMILIES[kind].vocabulary(config)[0]
    sentences = ["the dog runs", "cats sleep", ""]
    ids = [vocabulary.ours[torch.tensor(row, dtype=torch.int64)].tolist() for row in theirs.encode(sentences)]
    assert subwords.encode(sentences, "source") == ids
    assert subwords.decode(ids, "target") == sentences
    assert subwords.pieces([0, 1, 2, 3], "source") == ["<pad>", "<unk>", "<s>", "</s>"]


def test_subwords_of_another_kind(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5", "vocab_size": 9}))
    with pytest.raises(ValueError, match=r"has no subwords that are known here: neither spiece.model nor tokenizer"):
        subwords_of(tmp_path)
    (tmp_path / "spiece.model").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"spiece.model is no sentencepiece model$"):
        subwords_of(tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# What does not go together
# ---------------------------------------------------------------------------------------------------------------------


def test_weights_go_into_a_model_that_is_built_as_theirs(tmp_path):
    checkpoint(tmp_path)
    # Dropout, capacity, noise and losses of its own.
    moe = replace(
        EXPERTS,
        router=core.TokenChoice(top_k=1, jitter_eps=0.1),
        capacity_factor=1.25,
        balance=core.Balance(load_balancing=0.5),
    )
    model = switch_model(replace(T5, dropout=0.3, ffn_dropout=0.2), ffn=moe)
    load_pretrained_weights(model, tmp_path)
    assert same_weights(model, load_pretrained(tmp_path))


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: switch_model(replace(T5, size="tiny")), "encoder_layers=4 of the model is, in F, 2"),
        (lambda: switch_model(replace(T5, norm="layer")), "norm='layer' of the model is, in F, 'rms'"),
        (lambda: switch_model(ffn=None), "encoder_moe_blocks=() of the model is, in F, (1,)"),
        (lambda: switch_model(ffn=replace(EXPERTS, num_experts=8)), "moe.num_experts=8 of the model is, in F, 4"),
        (
            lambda: switch_model(ffn=replace(EXPERTS, expert=core.FFN(128, "gelu"))),
            "moe.expert=FFN(hidden_dim=128, activation='gelu', bias=False) of the model is, in F, "
            "FFN(hidden_dim=128, activation='relu', bias=False)",
        ),
        (lambda: LanguageModel(MIXTRAL, vocab=VOCAB), "a LanguageModel is not what F holds: switch_transformers"),
        (
            lambda: TranslationModel(T5, source_vocab=VOCAB + 1, ffn=EXPERTS),
            "tie='inputs' of the model is, in F, 'all'",
        ),
        (
            lambda: TranslationModel(replace(T5, tie="none"), source_vocab=VOCAB, target_vocab=31, ffn=EXPERTS),
            "tie='none' of the model is, in F, 'all'",
        ),
    ],
)
def test_a_model_built_otherwise_is_refused_with_both_values(tmp_path, build, message):
    checkpoint(tmp_path)
    with pytest.raises(ValueError) as error:
        load_pretrained_weights(build(), tmp_path)
    assert str(error.value).replace(str(tmp_path), "F") == message


def test_another_vocabulary_is_refused(tmp_path):
    checkpoint(tmp_path)
    model = TranslationModel(
        replace(T5, tie="all", logits_scale=0.125), source_vocab=VOCAB + 1, ffn=EXPERTS
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"^vocab_size=31 of the model is, in .*, 30$"):
        load_pretrained_weights(model, tmp_path)


@pytest.mark.parametrize(
    "build, message",
    [
        (
            lambda: TranslationModel(replace(T5, positions="rotary"), source_vocab=VOCAB),
            "positions='rotary': no published encoder-decoder here has them",
        ),
        (
            lambda: TranslationModel(replace(T5, norm="layer"), source_vocab=VOCAB),
            "norm='layer' cannot be said in t5, which has 'rms'",
        ),
        (
            lambda: TranslationModel(replace(T5, tie="decoder"), source_vocab=VOCAB),
            "tie='decoder': published models tie all embeddings, or not the output",
        ),
        (
            lambda: TranslationModel(replace(NLLB, tie="none"), source_vocab=VOCAB, target_vocab=40),
            "vocab_size=(30, 40) cannot be said in m2m_100, which has 40",
        ),
        (
            lambda: switch_model(replace(T5, encoder_layers=6), encoder_moe_blocks=[0, 1]),
            "moe layers [0, 1] of 6 are not every n-th layer, as published models have them",
        ),
        (
            lambda: switch_model(ffn=replace(EXPERTS, num_shared_experts=1)),
            "moe.num_shared_experts=1 cannot be said in switch_transformers, which has 0",
        ),
        (
            lambda: switch_model(ffn=replace(EXPERTS, router=core.Hash(VOCAB))),
            "router Hash cannot be said in switch_transformers, which has TokenChoice",
        ),
        (
            lambda: TranslationModel(T5, source_vocab=VOCAB, ffn=core.DenseFFN(64)),
            "encoder.layers.1.ffn.w_in.weight of shape (64, 64) is (128, 64) in t5",
        ),
        (
            lambda: LanguageModel(replace(MIXTRAL, norm="layer"), vocab=VOCAB),
            "norm='layer' cannot be said in mistral, which has 'rms'",
        ),
    ],
)
def test_what_published_architectures_lack_is_named(build, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        to_published(build())


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("mistral", {"sliding_window": 4096}, "sliding_window=4096: attention to the last tokens alone"),
        ("mistral", {"rope_parameters": {"rope_type": "yarn"}}, "rope_type='yarn': rotary positions are 'default'"),
        ("mistral", {"hidden_act": "quick_gelu"}, "activation 'quick_gelu' is not one of relu, gelu"),
        ("mistral", {"hidden_size": None}, "config.json of a mistral says no hidden_size"),
        ("mixtral", {"num_experts_per_tok": 1}, "normalize=True with top_k=1 makes every gate 1"),
        ("m2m_100", {"encoder_ffn_dim": 7}, "encoder_ffn_dim=7 is not decoder_ffn_dim=128: here they are one"),
        ("nllb-moe", {"second_expert_policy": "sampling"}, "second_expert_policy='sampling' is not one of all, random"),
        ("t5", {"d_model": "16"}, "config.json of a t5 says d_model='16', which is no whole number"),
        ("m2m_100", {"encoder_layers": True}, "config.json of a m2m_100 says encoder_layers=True, which is no whole"),
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
