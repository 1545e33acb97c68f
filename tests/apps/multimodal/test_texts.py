"""Captions become ids by subwords or by a sentence encoder's word pieces."""

from __future__ import annotations

import pytest
import torch
from made_encoder import PIECES, write_encoder

from apps.data.subwords import SubwordConfig
from apps.multimodal.pairs.encoding import EncodedTexts, TextOptions

CAPTIONS = ["a red shoe", "a blue hat", "a red hat and a blue shoe"]
SMALL = SubwordConfig(vocab_size=300)


def test_learned_subwords_take_no_notice_of_case(tmp_path):
    text = TextOptions(SMALL).encoding(CAPTIONS, tmp_path)
    assert text.ids("A Red SHOE") == text.ids("a red shoe")
    cased = TextOptions(SMALL, lower_case=False).encoding(CAPTIONS, tmp_path)
    assert cased.ids("A Red SHOE") != cased.ids("a red shoe")
    assert text.digest != cased.digest
    assert text.words(text.ids("a red shoe"))[0] == "<s>"


def test_a_text_of_ten_thousand_words_is_cut(tmp_path):
    text = TextOptions(SMALL, max_tokens=7).encoding(CAPTIONS, tmp_path)
    ids = text.ids("red " * 10_000)
    assert len(ids) == 7
    assert (ids[0], ids[-1]) == (2, 3)


def test_the_pieces_of_a_sentence_encoder_are_used_unchanged(tmp_path):
    folder = write_encoder(tmp_path / "encoder")
    text = TextOptions(SubwordConfig(path=str(folder)), max_tokens=6).encoding(CAPTIONS, tmp_path)
    assert text.pieces == PIECES
    assert text.words(text.ids("Red shoes, unknown")) == ["[CLS]", "red", "shoe", "##s", ",", "[SEP]"]


def test_rows_of_ids_are_padded_to_the_longest_of_them(tmp_path):
    text = TextOptions(SMALL).encoding(CAPTIONS, tmp_path)
    encode = EncodedTexts([*CAPTIONS, ""], text)
    for numbers in ([0], [1, 3], [2, 0, 0, 3]):
        wanted = text.encode([[*CAPTIONS, ""][n] for n in numbers])
        assert torch.equal(encode(torch.tensor(numbers)), wanted)
    assert text.rows(CAPTIONS) == [text.ids(caption) for caption in CAPTIONS]


def test_a_checkpoints_tokenizer_must_be_the_one_that_is_asked_for(tmp_path):
    folder = write_encoder(tmp_path / "encoder")
    pieces = TextOptions(SubwordConfig(path=str(folder)))
    learned = TextOptions(SMALL)
    for options in (pieces, learned, TextOptions()):
        options.check(options.encoding(CAPTIONS, tmp_path), tmp_path)
    of_pieces, of_learned = (options.encoding(CAPTIONS, tmp_path) for options in (pieces, learned))
    TextOptions().check(of_pieces, tmp_path)  # nothing is asked for
    cases = [
        (pieces, of_learned, r"tokenizer asks for the 13 subwords of .*encoder, and the checkpoint has \d+ subwords"),
        (
            learned,
            of_pieces,
            "tokenizer asks for 300 learned subwords, and the checkpoint has 13 subwords of a sentence",
        ),
        (TextOptions(SubwordConfig(vocab_size=270)), of_learned, "asks for 270 learned subwords, and the checkpoint"),
        (TextOptions(max_tokens=9), of_learned, "max_tokens=9 is not the checkpoint's, .* with max_tokens=32"),
        (TextOptions(lower_case=False), of_learned, "lower_case=False is not the checkpoint's"),
    ]
    for options, text, message in cases:
        with pytest.raises(ValueError, match=message) as error:
            options.check(text, tmp_path)
        assert "\n" not in str(error.value)
