"""Texts as the ids of published vocabularies: CLIP's byte pairs, BERT's word pieces, and sentencepiece with our ids."""

from __future__ import annotations

import gzip
import json
from typing import Any

import pytest
import torch
from made_encoder import PIECES
from refusals import refused

from apps.porting import FAMILIES, Vocabulary, subwords_of
from apps.porting.byte_pairs import FILE, BytePairs
from apps.porting.sentences import WordPieces

MERGES = ["e d</w>", "r ed</w>", "s h", "sh o", "e s</w>", "sho es</w>"]
RED, SHOES, BEGIN, END = 512 + 1, 512 + 5, 512 + 6, 512 + 7


def test_the_most_frequent_pair_is_merged_first_and_a_long_text_is_cut_and_ends(tmp_path):
    pairs = BytePairs(MERGES)
    assert len(pairs.pieces) == 256 + 256 + len(MERGES) + 2
    assert pairs.encode("Red  SHOES", 64) == [BEGIN, RED, SHOES, END]
    # "!" is byte 33, the first of those that can be seen.
    assert pairs.encode("!", 64) == [BEGIN, 256, END]
    assert pairs.encode("red shoes red", 3) == [BEGIN, RED, END]
    (tmp_path / FILE).write_bytes(gzip.compress("\n".join(["#version: 0.2", *MERGES, ""]).encode()))
    assert BytePairs.of(tmp_path).pieces == pairs.pieces


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("reds shoe", ["r", "e", "d", "s</w>", "sho", "e</w>"]),
        ("e's 42", ["e</w>", "'", "s</w>", "4</w>", "2</w>"]),
        ("e &amp;amp; !?", ["e</w>", "&</w>", "!", "?</w>"]),
        ("é", ["Ã", "©</w>"]),  # two bytes of UTF-8, C3 and A9
        (" \t\n", []),
        ("a<end_of_text>", ["a</w>", "<end_of_text>"]),
    ],
)
def test_words_as_byte_pairs(text, pieces):
    pairs = BytePairs(MERGES)
    assert [pairs.pieces[i] for i in pairs.encode(text, 64)][1:-1] == pieces


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
def test_a_text_is_cut_into_the_longest_word_pieces(text, pieces):
    assert [PIECES[i] for i in WordPieces(PIECES).encode(text, 64)] == ["[CLS]", *pieces, "[SEP]"]


def test_case_and_length_and_a_piece_that_separates_lines(tmp_path):
    assert WordPieces(PIECES, lower_case=False).encode("Red red", 9) == [2, 1, 4, 3]
    assert WordPieces(PIECES).encode("red shoes hat", 4) == [2, 4, 5, 3]
    pieces = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "\u2028", "\x85", "red")
    (tmp_path / "vocab.txt").write_text("".join(f"{piece}\r\n" for piece in pieces), encoding="utf-8")
    assert WordPieces.of(tmp_path).encode("red", 9) == [2, 6, 3]


def test_specials_come_first_and_the_others_keep_their_order():
    # fairseq: begin 0, padding 1, end 2, unknown 3.
    fairseq = Vocabulary(6, pad=1, unk=3, bos=0, eos=2, spare=1)
    # T5: padding 0, end 1, unknown 2, and no begin: a copy of padding, with which their decoder starts. The way back
    # takes that copy, which is what was read.
    t5 = Vocabulary(5, pad=0, unk=2, bos=None, eos=1, spare=0)
    assert (fairseq.theirs.tolist(), fairseq.ours.tolist()) == ([1, 3, 0, 2, 4, 5], [2, 0, 3, 1, 4, 5])
    assert (t5.theirs.tolist(), t5.ours.tolist()) == ([0, 2, 0, 1, 3, 4], [2, 3, 1, 4, 5])
    assert fairseq.our_size == t5.our_size == 6
    assert t5.resized(9) == Vocabulary(8, pad=0, unk=2, bos=None, eos=1, spare=0)


@pytest.mark.parametrize("kind", ["t5", "mistral"])
def test_sentencepiece_models_have_our_ids(kind, tmp_path):
    from sentencepiece import SentencePieceProcessor, SentencePieceTrainer

    words = ["a dog runs", "a cat sleeps", "the dog sleeps", "the cat runs fast", "dogs and cats"]
    layouts: dict[str, tuple[str, dict[str, Any], dict[str, int]]] = {
        "t5": ("spiece.model", {"pad_id": 0, "eos_id": 1, "unk_id": 2, "bos_id": -1, "model_type": "unigram"},
               {"pad_token_id": 0, "eos_token_id": 1}),
        "mistral": ("tokenizer.model", {"unk_id": 0, "bos_id": 1, "eos_id": 2, "model_type": "bpe"},
                    {"bos_token_id": 1, "eos_token_id": 2}),
    }  # fmt: skip
    name, options, specials = layouts[kind]
    options |= {"vocab_size": 40, "hard_vocab_limit": False, "minloglevel": 2}
    with (tmp_path / name).open("wb") as file:
        SentencePieceTrainer.train(sentence_iterator=iter(words * 4), model_writer=file, **options)
    theirs = SentencePieceProcessor(model_file=str(tmp_path / name))
    size = theirs.vocab_size() + 5  # as T5's, with ids that are no subwords
    config = {"model_type": kind, "vocab_size": size, **specials}
    (tmp_path / "config.json").write_text(json.dumps(config))
    subwords = subwords_of(tmp_path)
    assert subwords.size("source") == size + 1  # T5 has no begin, Mistral no padding
    vocabulary = FAMILIES[kind].vocabulary(config)[0]
    sentences = ["the dog runs", "cats sleep", ""]
    ids = [vocabulary.ours[torch.tensor(row, dtype=torch.int64)].tolist() for row in theirs.encode(sentences)]
    assert subwords.encode(sentences, "source") == ids
    assert subwords.decode(ids, "target") == sentences
    assert subwords.pieces([0, 1, 2, 3], "source") == ["<pad>", "<unk>", "<s>", "</s>"]


def test_files_and_ids_that_cannot_be_are_refused(tmp_path):
    refused(r"bpe_simple_vocab_16e6.txt.gz is missing: it is CLIP's vocabulary", BytePairs.of, tmp_path)
    (tmp_path / FILE).write_bytes(b"no gzip")
    refused(r"bpe_simple_vocab_16e6.txt.gz cannot be read", BytePairs.of, tmp_path)
    refused(r"the merge 'sh o' does not join two", BytePairs, ["sh o"])
    refused(r"the 2 word pieces lack \[PAD\]", WordPieces, ["red", "hat"])
    refused(r"^the id 5 of eos is not in a vocabulary of vocab_size=5$", Vocabulary, 5, 0, 2, None, 5, 0)
    refused(r"one stands for two$", Vocabulary, 5, 0, 2, 0, 1, 0)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5", "vocab_size": 9}))
    refused(r"has no subwords that are known here: neither spiece.model nor tokenizer", subwords_of, tmp_path)
    (tmp_path / "spiece.model").write_bytes(b"nothing")
    refused(r"spiece.model is no sentencepiece model$", subwords_of, tmp_path)
