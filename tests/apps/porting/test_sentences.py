"""Sentence encoders: the pieces of a text, and BERT computed head by head."""

from __future__ import annotations

import contextlib
import json
import math

import pytest
import torch
from made_encoder import DIM, HIDDEN, PIECES, write_encoder
from safetensors.torch import load_file
from torch.testing import assert_close

import core
from apps.porting.sentences import BertConfig, SentenceEncoder, SentenceTower, WordPieces, sentence_weights


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("Red SHOES, blue\that", ["red", "shoe", "##s", ",", "blue", "hat"]),
        ("Café", ["cafe"]),  # an accent is dropped
        ("unknown redhat", ["un", "##known", "[UNK]"]),
        ("blue\u200b\x00 \u4e2d", ["blue", "[UNK]"]),  # no width and no character; a Chinese character is a word
        ("", []),
        ("red" + "s" * 98, ["[UNK]"]),  # a word of 101 characters
    ],
)
def test_a_text_is_cut_into_the_longest_pieces(text, pieces):
    words = WordPieces(PIECES)
    assert [PIECES[i] for i in words.encode(text, 64)] == ["[CLS]", *pieces, "[SEP]"]


def test_case_and_length():
    assert WordPieces(PIECES, lower_case=False).encode("Red red", 9) == [2, 1, 4, 3]
    assert WordPieces(PIECES).encode("red shoes hat", 4) == [2, 4, 5, 3]
    with pytest.raises(ValueError, match=r"the 2 word pieces lack \[PAD\]"):
        WordPieces(["red", "hat"])


def by_hand(folder, ids):
    """Compute a text's vector as the paper's formulas say, one head and one text at a time."""
    w = load_file(folder / "model.safetensors")

    def norm(x, name):
        centered = x - x.mean(1, keepdim=True)
        scaled = centered / (centered.square().mean(1, keepdim=True) + 1e-12).sqrt()
        return scaled * w[f"{name}.LayerNorm.weight"] + w[f"{name}.LayerNorm.bias"]

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]

    e = "embeddings."
    x = w[f"{e}word_embeddings.weight"][ids] + w[f"{e}position_embeddings.weight"][: len(ids)]
    x = norm(x + w[f"{e}token_type_embeddings.weight"][0], "embeddings")
    for layer in range(2):
        first = f"encoder.layer.{layer}."
        q, k, v = (linear(x, f"{first}attention.self.{name}") for name in ("query", "key", "value"))
        heads = []
        for h in (slice(0, DIM // 2), slice(DIM // 2, DIM)):
            heads.append((q[:, h] @ k[:, h].T / math.sqrt(DIM // 2)).softmax(1) @ v[:, h])
        x = norm(x + linear(torch.cat(heads, 1), f"{first}attention.output.dense"), f"{first}attention.output")
        up = linear(x, f"{first}intermediate.dense")
        up = up * 0.5 * (1 + torch.erf(up / math.sqrt(2)))
        x = norm(x + linear(up, f"{first}output.dense"), f"{first}output")
    mean = x.mean(0)
    return mean / mean.square().sum().sqrt()


@pytest.mark.parametrize("prefix", ["", "bert."])
def test_a_vector_is_the_mean_of_the_pieces_at_unit_length(tmp_path, prefix):
    folder = write_encoder(tmp_path / "plain")
    encoder = SentenceEncoder(write_encoder(tmp_path / "own", prefix=prefix))
    texts = ["red shoes", "", "blue hat, red hat, blue shoes", "unknown"]
    vectors = encoder.encode(texts, 64)
    for text, vector in zip(texts, vectors, strict=True):
        assert_close(vector, by_hand(folder, encoder.pieces.encode(text, 16)), rtol=1e-5, atol=1e-6)
    # The first 6 pieces of the third text: [CLS] blue hat , red [SEP].
    assert_close(encoder.encode(texts[2:3], 6), encoder.encode(["blue hat, red"], 64))


@pytest.mark.parametrize(
    ("changed", "match"),
    [
        ({"model_type": "mpnet"}, r"holds a model of type 'mpnet' \(None\): a sentence encoder is read where"),
        ({"hidden_act": "relu"}, r"of type 'bert' \(relu\)"),
        ({"num_hidden_layers": 3}, r"lacks the tensor 'encoder.layer.2.attention.self.query.weight'"),
    ],
)
def test_another_model_is_refused(tmp_path, changed, match):
    folder = write_encoder(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changed}))
    with pytest.raises(ValueError, match=match):
        SentenceEncoder(folder)


def test_another_pooling_is_refused(tmp_path):
    folder = write_encoder(tmp_path)
    (folder / "1_Pooling").mkdir()
    for name in ("mean_tokens", "cls_token"):
        modes = {f"pooling_mode_{mode}": mode == name for mode in ("cls_token", "mean_tokens")}
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(modes))
        refused = pytest.raises(ValueError, match="takes pooling_mode_cls_token: a text's vector is the mean")
        with contextlib.nullcontext() if name == "mean_tokens" else refused:
            SentenceEncoder(folder)


def test_a_piece_may_be_a_separator_of_lines(tmp_path):
    pieces = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "\u2028", "\x85", "red")
    (tmp_path / "vocab.txt").write_text("".join(f"{piece}\r\n" for piece in pieces), encoding="utf-8")
    assert WordPieces.of(tmp_path).encode("red", 9) == [2, 6, 3]


def test_a_tower_for_training_is_the_frozen_encoder(tmp_path):
    folder = write_encoder(tmp_path)
    config = BertConfig.of(folder)
    assert config == BertConfig(DIM, HIDDEN, depth=2, num_heads=2, max_positions=16)
    tower = SentenceTower(config, len(PIECES))
    tower.load_state_dict(sentence_weights(folder, tower.state_dict()))
    ids_BL = torch.tensor([[2, 4, 5, 6, 3], [2, 8, 3, 0, 0]])  # [CLS] red shoe ##s [SEP]; [CLS] hat [SEP]
    vectors = torch.nn.functional.normalize(tower(ids_BL), dim=1)
    assert_close(vectors, SentenceEncoder(folder).encode(["red shoes", "hat"], 16), rtol=1e-6, atol=1e-7)
    vectors[:, 0].sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in tower.layers.parameters() if p.ndim == 2)


def test_a_mixture_in_the_tower_routes_no_padding():
    moe = core.MoEConfig(4, core.TokenChoice(2), core.FFN(HIDDEN, bias=True))
    tower = SentenceTower(BertConfig(DIM, HIDDEN, 2, 2, 16, dropout=0.5), len(PIECES), moe).eval()
    assert list(core.moe_layers(tower)) == ["layers.1.ffn"]
    ids_BL = torch.tensor([[2, 4, 5, 6, 3], [2, 8, 3, 0, 0]])
    with core.record(tower) as tape:
        both = tower(ids_BL)
    (recorded,) = tape.entries
    assert recorded.routing.tokens_per_expert_E.sum() == 2 * (5 + 3)  # two experts for each of 8 pieces
    assert_close(both[1:], tower(ids_BL[1:, :3]))
    assert not torch.equal(tower.train()(ids_BL), both)  # dropout
    with pytest.raises(ValueError, match="a text of 17 subwords exceeds max_positions=16"):
        tower(torch.ones(1, 17, dtype=torch.long))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"dim": 10, "num_heads": 4}, "dim=10 is not divisible by num_heads=4"),
    ],
)
def test_sizes_out_of_range_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        BertConfig(**options)
