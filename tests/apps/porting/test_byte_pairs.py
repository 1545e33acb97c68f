"""CLIP's tokenizer: merges by hand, words, and what is refused."""

from __future__ import annotations

import gzip

import pytest

from apps.porting.byte_pairs import FILE, BytePairs

MERGES = ["e d</w>", "r ed</w>", "s h", "sh o", "e s</w>", "sho es</w>"]
RED, SHOES = 512 + 1, 512 + 5
BEGIN, END = 512 + 6, 512 + 7


def spelled(pairs, text, most=64):
    return [pairs.pieces[i] for i in pairs.encode(text, most)][1:-1]


def test_the_most_frequent_pair_is_merged_first():
    pairs = BytePairs(MERGES)
    assert len(pairs.pieces) == 256 + 256 + len(MERGES) + 2
    assert pairs.encode("Red  SHOES", 64) == [BEGIN, RED, SHOES, END]
    assert spelled(pairs, "reds shoe") == ["r", "e", "d", "s</w>", "sho", "e</w>"]
    # "!" is byte 33, the first of those that can be seen.
    assert pairs.encode("!", 64) == [BEGIN, 256, END]


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("e's 42", ["e</w>", "'", "s</w>", "4</w>", "2</w>"]),
        ("e &amp;amp; !?", ["e</w>", "&</w>", "!", "?</w>"]),
        ("é", ["Ã", "©</w>"]),  # two bytes of UTF-8, C3 and A9
        (" \t\n", []),
        ("a<end_of_text>", ["a</w>", "<end_of_text>"]),
    ],
)
def test_words(text, pieces):
    assert spelled(BytePairs(MERGES), text) == pieces


def test_a_long_text_is_cut_and_ends():
    assert BytePairs(MERGES).encode("red shoes red", 3) == [BEGIN, RED, END]


def test_the_published_file_is_read(tmp_path):
    (tmp_path / FILE).write_bytes(gzip.compress("\n".join(["#version: 0.2", *MERGES, ""]).encode()))
    assert BytePairs.of(tmp_path).pieces == BytePairs(MERGES).pieces


def test_a_file_that_is_none_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"bpe_simple_vocab_16e6.txt.gz is missing: it is CLIP's vocabulary"):
        BytePairs.of(tmp_path)
    (tmp_path / FILE).write_bytes(b"no gzip")
    with pytest.raises(ValueError, match=r"bpe_simple_vocab_16e6.txt.gz cannot be read"):
        BytePairs.of(tmp_path)
    with pytest.raises(ValueError, match=r"the merge 'sh o' does not join two"):
        BytePairs(["sh o"])
