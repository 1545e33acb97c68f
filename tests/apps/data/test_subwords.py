"""Subwords of a corpus: learned the same each time, from the given text alone, and able to spell any."""

from __future__ import annotations

import base64
import threading

import pytest

from apps.data import subwords as module
from apps.data.subwords import BOS_ID, EOS_ID, PAD_ID, UNK_ID, SubwordConfig, Subwords, train_subwords

SOURCE = [f"the {a} dog sees the {b} cat" for a in ("old", "young", "small") for b in ("white", "black", "grey")]
COLORS = ("weiße", "schwarze", "graue")
TARGET = [f"der {a} Hund sieht die {b} Katze" for a in ("alte", "junge", "kleine") for b in COLORS]
SMALL = SubwordConfig(vocab_size=320)


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_specials_come_first_and_the_text_comes_back(kind):
    subwords = train_subwords(SOURCE, TARGET, SubwordConfig(kind, 310))
    assert subwords.is_joint
    assert subwords.size("source") == subwords.size("target") == {"bpe": 310, "unigram": 297}[kind]  # all there are
    assert subwords.pieces([PAD_ID, UNK_ID, BOS_ID, EOS_ID], "source") == ["<pad>", "<unk>", "<s>", "</s>"]
    for side, lines in (("source", SOURCE), ("target", TARGET)):
        ids = subwords.encode(lines, side)
        assert subwords.decode(ids, side) == lines
        assert subwords.decode([[BOS_ID, *row, EOS_ID, PAD_ID, UNK_ID] for row in ids], side) == lines
        assert not {PAD_ID, UNK_ID, BOS_ID, EOS_ID} & {i for row in ids for i in row}


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_the_same_text_gives_the_same_model_and_nothing_is_printed(kind, capfd):
    config = SubwordConfig(kind, 310)
    first = train_subwords(iter(SOURCE), TARGET, config)
    assert first == train_subwords(SOURCE, iter(TARGET), config)
    assert first == train_subwords([*SOURCE, *SOURCE, ""], TARGET, config)  # a sentence that comes again counts once
    assert first.digest != train_subwords(SOURCE[1:], TARGET, config).digest
    assert capfd.readouterr() == ("", "")


def test_what_the_text_lacks_is_spelled_in_bytes_on_a_line_that_no_terminal_obeys():
    subwords = train_subwords(SOURCE, TARGET, SMALL)
    (ids,) = subwords.encode(["dog 漢 \U0001f600 ½ …"], "source")
    assert UNK_ID not in ids
    assert subwords.decode([ids], "source") == ["dog 漢 \U0001f600 ½ …"]  # nothing was exchanged for what looks alike
    assert subwords.pieces(subwords.encode(["漢"], "source")[0], "source") == ["▁", "<0xE6>", "<0xBC>", "<0xA2>"]
    first = subwords.processor("source").piece_to_id("<0x00>")
    (dog,) = subwords.encode(["dog"], "source")
    # A bell, an escape, a line end; U+2028 and U+009B in UTF-8.
    for spelled in (b"\x07", b"\x1b", b"\r\n", b"\xe2\x80\xa8", b"\xc2\x9b"):
        ids = [*dog, *(first + byte for byte in spelled), *dog]
        assert subwords.decode([ids, [first + 10]], "source") == ["dog  dog", ""]


def test_separate_sides_have_models_of_their_own_and_a_tag_is_no_text():
    subwords = train_subwords(SOURCE, TARGET, SubwordConfig(vocab_size=300, joint=False), ["de", "fr"])
    assert not subwords.is_joint
    # ß and z are in German words alone: English spells them in bytes
    for side, is_known in (("target", True), ("source", False)):
        assert ("ß" in "".join(subwords.pieces(subwords.encode(["weiße"], side)[0], side))) == is_known
    assert [subwords.tag_id(language) for language in ("de", "fr")] == [4, 5]
    assert subwords.pieces([4], "source") == ["<2de>"]
    assert "<2de>" not in subwords.pieces(range(subwords.size("target")), "target")
    subwords = train_subwords(SOURCE, TARGET, SMALL, ["de"])
    tag = subwords.tag_id("de")
    (ids,) = subwords.encode(["<2de> dog"], "source")
    assert tag not in ids
    assert subwords.decode([ids, [tag, *ids]], "source") == ["<2de> dog"] * 2
    with pytest.raises(ValueError, match="language 'fr' has no tag: there is de"):
        subwords.tag_id("fr")


def test_a_vocabulary_is_limited_by_its_characters_below_and_its_text_above_and_others_are_refused():
    # 4 specials, 256 bytes and 21 characters: the 20 letters of SOURCE's words and the space
    letters = len(set("".join(SOURCE)))
    with pytest.raises(ValueError, match=rf"vocab_size=100 is too small: .* are {260 + letters}$"):
        train_subwords(SOURCE, (), SubwordConfig(vocab_size=100))
    train_subwords(SOURCE, (), SubwordConfig(vocab_size=260 + letters))
    assert 260 + letters < train_subwords(SOURCE, (), SubwordConfig(vocab_size=32_000)).size("source") < 400
    with pytest.raises(ValueError, match="there is no text to learn subwords from"):
        train_subwords(["", ""], (), SMALL)
    three = r"^subwords.models=.* has length 3, which is not in \[1, 2\]: one for both sides, or one for each$"
    with pytest.raises(ValueError, match=three):
        Subwords(("a", "b", "c"))
    with pytest.raises(ValueError, match="subwords: not a sentencepiece model"):
        Subwords(("bm8gbW9kZWw=",)).size("source")


def test_too_few_threads_are_an_error_before_sentencepiece_aborts(monkeypatch):
    start, left, before = threading.Thread.start, iter(range(3)), threading.active_count()

    def limited(thread):
        if next(left, None) is None:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", limited)
    with pytest.raises(RuntimeError, match=r"learned by 8 threads: can't start new thread; .*\(ulimit -v\)"):
        train_subwords(SOURCE, TARGET, SMALL)
    assert threading.active_count() == before


def test_a_trained_model_is_kept_in_the_cache(tmp_path, monkeypatch):
    first = train_subwords(SOURCE, TARGET, SMALL, ["de"], tmp_path)
    (kept,) = (tmp_path / "subwords").iterdir()
    assert base64.b64decode(first.models[0]) == kept.read_bytes()
    train, calls = module._train, []
    monkeypatch.setattr(module, "_train", lambda *a: calls.append(a) or train(*a))
    assert train_subwords(SOURCE, TARGET, SMALL, ["de"], tmp_path) == first
    assert not calls
    train_subwords(SOURCE, TARGET, SMALL, ["fr"], tmp_path)
    train_subwords(SOURCE, TARGET, SubwordConfig(vocab_size=321), ["de"], tmp_path)
    train_subwords(SOURCE, [*TARGET, "neu"], SMALL, ["de"], tmp_path)
    assert len(calls) == len(list((tmp_path / "subwords").iterdir())) - 1 == 3


@pytest.mark.parametrize("space", [" ", ""])
def test_a_long_line_is_learned_from_as_its_parts_are(space):
    words = ["alpha", "beta", "gämma", "delta"] * 2000
    line = space.join(words)
    assert len(line.encode()) > 2 * module._LONGEST_BYTES
    parts = list(module._parts(line))
    assert "".join(parts) == line
    assert all(len(part.encode()) <= module._LONGEST_BYTES for part in parts)
    assert {word for part in parts for word in part.split()} == set(words) or not space  # no word is cut
    whole = train_subwords([line], (), SMALL)
    assert whole == train_subwords(parts, (), SMALL)
    assert "ä" in "".join(whole.pieces(range(whole.size("source")), "source"))


def test_of_a_large_corpus_so_many_sentences_are_drawn(monkeypatch):
    seen, train, lines = [], module._train, [f"line {i}" for i in range(100)]
    monkeypatch.setattr(module, "_train", lambda sentences, *a: seen.append(sentences) or train(sentences, *a))
    for _ in range(2):
        train_subwords(lines, (), SubwordConfig(vocab_size=300, max_sentences=30))
    assert seen[0] == seen[1]
    assert len(seen[0]) == 30
    assert set(seen[0]) < set(lines)
