"""BLEU and chrF++ with one or several references, by hand and against sacrebleu itself."""

from __future__ import annotations

import pytest
import sacrebleu

from apps.nlp.text.scores import corpus_score, signature


def test_the_best_reference_counts_for_each_text():
    # Each text is one of its own references: all n-grams are right, and the closest length is its own.
    captions = ["a b c d e", "f g h i"]
    references = [["x y z", "a b c d e"], ["f g h i"]]
    assert corpus_score("bleu", captions, references) == pytest.approx(100)
    assert corpus_score("chrf", captions, references) == pytest.approx(100)
    # Against the first references alone, the first text has nothing right: 4 of 9 words, 3 of 7 pairs, 2 of 5, 1 of 3;
    # the 9 words are longer than the references' 7, so there is no penalty.
    first = [own[0] for own in references]
    assert corpus_score("bleu", captions, first) == pytest.approx(100 * (4 / 9 * 3 / 7 * 2 / 5 * 1 / 3) ** 0.25)


def test_several_references_are_passed_on_as_sacrebleu_takes_them():
    captions = ["a dog runs on the green grass", "two men sit on a bench"]
    references = [["a dog is running on the grass", "the dog runs on green grass"], ["two men on a bench", "men sit"]]
    streams = [[own[place] for own in references] for place in (0, 1)]
    assert corpus_score("bleu", captions, references) == sacrebleu.corpus_bleu(captions, streams).score
    assert corpus_score("chrf", captions, references) == sacrebleu.corpus_chrf(captions, streams, word_order=2).score


def test_a_text_needs_a_reference():
    with pytest.raises(ValueError, match="text 1 has no reference"):
        corpus_score("bleu", ["a", "b"], [["a"], []])


def test_the_signature_has_the_number_of_references():
    assert signature("bleu", references=2).startswith("nrefs:2|")
    assert signature("bleu", references=None).startswith("nrefs:var|")
    assert signature("chrf").startswith("nrefs:1|case:mixed|")
