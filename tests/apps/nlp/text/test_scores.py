"""BLEU and chrF++ with one or several references, by hand and against sacrebleu; what is read, and nats a token."""

from __future__ import annotations

import pytest
import sacrebleu
import torch

from apps.data.subwords import BOS_ID, EOS_ID, PAD_ID
from apps.nlp.text.foreseen import read_ids
from apps.nlp.text.scores import corpus_score, signature
from apps.train.step.pieces import ratio_values


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


def test_scores_are_sacrebleu_s_own_with_one_or_several_references():
    captions = ["a dog runs, on the green grass", "two men sit on a bench"]
    references = [["a dog is running on the grass", "the dog runs on green grass"], ["two men on a bench", "men sit"]]
    streams = [[own[place] for own in references] for place in (0, 1)]
    for given, expected in ((references, streams), (streams[0], streams[:1])):
        assert corpus_score("bleu", captions, given) == sacrebleu.corpus_bleu(captions, expected).score
        assert corpus_score("chrf", captions, given) == sacrebleu.corpus_chrf(captions, expected, word_order=2).score


def test_a_text_needs_a_reference_and_the_signature_has_their_number():
    with pytest.raises(ValueError, match="text 1 has no reference"):
        corpus_score("bleu", ["a", "b"], [["a"], []])
    assert signature("bleu", references=2).startswith("nrefs:2|")
    assert signature("bleu", references=None).startswith("nrefs:var|")
    assert signature("chrf").startswith("nrefs:1|case:mixed|")


def test_the_decoder_reads_all_but_the_end_and_the_mean_of_a_ratio_s_values_is_the_ratio():
    target = torch.tensor([[BOS_ID, 7, 8, EOS_ID], [BOS_ID, 9, EOS_ID, PAD_ID]])
    # To be said: 7 8 EOS, 9 EOS. After an EOS there is nothing to say, so it is not read.
    assert read_ids(target).tolist() == [[BOS_ID, 7, 8], [BOS_ID, 9, PAD_ID]]
    # 6 nats of 3 tokens: 2. The rows are 1 - 2 and 5 - 4 nats off, over 3 / 2 tokens a row.
    values = ratio_values(torch.tensor([1.0, 5.0]), torch.tensor([1.0, 2.0]))
    assert values.tolist() == pytest.approx([2 - 1 / 1.5, 2 + 1 / 1.5])
