"""Classes of subwords, counts from tapes that are written down, and what they say."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

import core
from apps.nlp.specialization import CLASSES, TextUse, by_class, by_label, side_of, specialization, token_classes, tokens
from apps.report.use import entropy


def classes(pieces, counts):
    return [CLASSES[c] for c in token_classes(pieces, np.array(counts))]


def test_what_is_no_word_is_told_by_its_characters():
    told = {"<unk>": "byte or unknown", "<s>": "begin of sentence", "</s>": "end of sentence", "<2de>": "language tag"}
    told |= {
        "<0xE4>": "byte or unknown",
        "▁24": "digits",
        "7": "digits",
        **dict.fromkeys((".", "▁-", "▁€"), "punctuation"),
    }
    assert classes([*told], [9] * 10) == [*told.values()]
    # "हि" is a letter and a vowel sign, "ि" that sign alone; a mark alone starts a word that is spelled after it.
    words = {"▁T-Shirt": "word start", "▁1st": "function-like", "чер": "continuation", "▁हि": "word start"}
    words |= {"ि": "continuation", "▁": "word start"}
    assert [c.split(",")[0] for c in classes([*words], [1] * 6)] == [*words.values()]


def test_words_are_quartered_by_the_tokens_before_them():
    # 40 tokens with letters. Before "ing" are 10 of them: the second quarter. What is no word does not count.
    quartered = {"▁the": "function-like", "▁playing": "word start, frequent", "ing": "continuation, 2nd quarter"}
    quartered |= {"▁dog": "word start, 2nd quarter", "s": "continuation, 3rd quarter", ".": "punctuation"}
    quartered |= {"▁cat": "word start, 3rd quarter", "er": "continuation, rare", "▁owl": "word start, rare"}
    assert classes([*quartered], [1000 if p == "." else 5 for p in quartered]) == [*quartered.values()]
    # "a" makes up 90 of 100 tokens: it begins the first quarter; "on", after it, belongs to the last; unseen is rare.
    assert classes(["▁on", "▁a", "x"], [10, 90, 0]) == ["word start, rare", "function-like", "continuation, rare"]
    # Long words and continuations are not like function words.
    assert classes(["▁under"], [1]) + classes(["ing"], [1]) == ["word start, frequent", "continuation, frequent"]


PIECES = ("<pad>", "<unk>", "<s>", "</s>", "▁dog", "▁cat")
# Stands for ``Subwords``: the same pieces on both sides.
WORDS = SimpleNamespace(size=lambda side: len(PIECES), pieces=lambda ids, side: [PIECES[i] for i in ids])


def entry(name, ids, experts, num_experts=2):
    """A pass in which each token of ``ids`` (B, S) has one pair; expert ``num_experts`` computes none."""
    ids, experts = torch.tensor(ids), torch.tensor(experts).flatten()
    counts = torch.bincount(experts, minlength=num_experts + 1)[:num_experts]
    T = ids.numel()
    routing = core.Routing(torch.arange(T), experts, torch.ones(T), counts, counts, T, valid_T=(ids != 0).flatten())
    return core.contract.Entry(name, routing, core.RoutingContext(ids != 0, ids), None)


def use_of(pairs, *batches):
    """Return the use of batches, each given as its entries and the pairs of its sentences."""
    use = TextUse(tokens, WORDS, pairs)  # type: ignore[arg-type]
    for entries, pair in batches:
        use.add(core.Tape(tuple(entries)), torch.tensor(pair))
    return use


def test_pairs_are_counted_by_sentence_and_by_subword_without_padding_and_what_was_dropped():
    # "dog </s> <pad>" and "cat dog </s>": the dog of the second sentence found no room.
    first = entry("model.encoder.layers.1.ffn", [[4, 3, 0], [5, 4, 3]], [[0, 1, 2], [1, 2, 1]])
    second = entry("model.encoder.layers.1.ffn", [[5, 3]], [[1, 1]])
    use = use_of(["en-de", "en-fr"], ([first], [0, 1]), ([second], [1]))
    (layer,) = use.layers
    assert (layer.name, layer.side, layer.num_experts, layer.num_pairs) == ("encoder 1", "source", 2, 6)
    assert layer.by_sentence.tolist() == [[1, 1], [0, 2], [0, 2]]
    assert layer.by_piece.tolist() == [[0, 0], [0, 0], [0, 0], [0, 3], [1, 0], [0, 2]]
    assert use.pair_B.tolist() == [0, 1, 1]
    assert by_label(layer, use.pair_B, 2).tolist() == [[1, 1], [0, 4]]
    counts = by_class(layer, use.classes_of("source"))
    assert {CLASSES[c]: counts[c].tolist() for c in np.flatnonzero(counts.sum(1))} == {
        "end of sentence": [0, 3],
        "function-like": [0, 2],  # the cat, which came more often than the dog
        "word start, 3rd quarter": [1, 0],
    }


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        (["en-de"], []),
        (["en-de", "en-fr"], ["target language"]),
        (["de-en", "fr-en"], ["source language"]),
        (["en-de", "de-en"], ["source language", "target language"]),  # either tells the pair
        (["en-de", "en-fr", "de-en"], ["source language", "target language"]),  # so does the target
        (["en-de", "en-fr", "de-en", "fr-en"], ["source language", "target language", "pair"]),
    ],
)
def test_sentences_are_labeled_by_what_tells_them_apart_in_the_order_of_mention(pairs, expected):
    use = TextUse(tokens, WORDS, pairs)  # type: ignore[arg-type]
    use.pair_B = np.roll(np.arange(len(pairs)), 1)
    labels = {about: (label_B.tolist(), names) for about, (label_B, names) in use.labels().items()}
    assert list(labels) == expected
    if "pair" in expected:
        assert labels["source language"] == ([2, 0, 0, 1], ("en", "de", "fr"))
        assert labels["target language"] == ([2, 0, 1, 2], ("de", "fr", "en"))
        assert labels["pair"] == ([3, 0, 1, 2], tuple(pairs))


def two_languages(experts):
    """40 sentences of one token each, every second one into French; ``experts`` of German and of French."""
    batches = [([entry("decoder.layers.0.ffn", [[4]], [[experts[i % 2]]])], [i % 2]) for i in range(40)]
    return use_of(["en-de", "en-fr"], *batches)


def test_what_an_expert_says_of_languages_and_classes_by_itself_and_by_chance():
    about = {s.about: s for s in specialization(two_languages([0, 1]))}
    languages = about["target language"]
    assert (languages.bits, languages.share, languages.num_labels, languages.num_pairs) == (1.0, 1.0, 2, 40)
    # Shuffled, 40 sentences still say about 1 / (2 * 40 * ln 2) = 0.018 bits.
    assert 0.005 < languages.by_chance < 0.05
    first = specialization(two_languages([1, 1]))[0]
    for nothing in (about["token class"], first):  # all tokens are one subword
        assert (nothing.bits, nothing.share, nothing.by_chance) == (0.0, 0.0, 0.0)
    assert first.about == "target language"
    # A layer used twice counts twice.
    passes = [entry("encoder.layers.0.ffn", [[4]], [[expert]]) for expert in (0, 1)]
    assert use_of(["en-de"], (passes, [0])).layers[0].by_sentence.tolist() == [[1, 1]]
    assert (side_of("decoder 3"), side_of("model.encoder.layers.0.ffn")) == ("target", "source")
    # 3 begins by expert 0, 5 dogs by expert 1: (2 - 1) (2 - 1) / (2 * 8 ln 2).
    use = use_of(["en-de"], ([entry("decoder.layers.0.ffn", [[2, 2, 2, 4, 4, 4, 4, 4]], [[0] * 3 + [1] * 5])], [0]))
    (row,) = specialization(use)
    assert row.bits == pytest.approx(entropy(np.array([3, 5])))
    assert row.share == pytest.approx(1.0)
    assert row.by_chance == pytest.approx(1 / (16 * np.log(2)))
