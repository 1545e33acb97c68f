"""BLEU and chrF++ by hand and against sacrebleu, what is read, and paired bootstrap resampling."""

import numpy as np
import pytest
import sacrebleu
import torch

from apps.data.subwords import BOS_ID, EOS_ID, PAD_ID
from apps.nlp.text.scores import corpus_score, scorer, signature
from apps.nlp.text.significance import compare_sentences, paired_bootstrap, sentence_statistics, text_differences
from apps.nlp.text.teacher_forced import read_ids
from apps.train.step.pieces import ratio_values


def test_scores_are_sacrebleu_s_own_with_one_or_several_references():
    # Each text is one of its own references: all n-grams are right, and the closest length is its own.
    captions = ["a b c d e", "f g h i"]
    references = [["x y z", "a b c d e"], ["f g h i"]]
    assert corpus_score("bleu", captions, references) == pytest.approx(100)
    assert corpus_score("chrf", captions, references) == pytest.approx(100)
    # Against the first references alone, the first text has nothing right: 4 of 9 words, 3 of 7 pairs, 2 of 5, 1 of 3;
    # the 9 words are longer than the references' 7, so there is no penalty.
    first = [own[0] for own in references]
    assert corpus_score("bleu", captions, first) == pytest.approx(100 * (4 / 9 * 3 / 7 * 2 / 5 * 1 / 3) ** 0.25)
    captions = ["a dog runs, on the green grass", "two men sit on a bench"]
    references = [["a dog is running on the grass", "the dog runs on green grass"], ["two men on a bench", "men sit"]]
    streams = [[own[place] for own in references] for place in (0, 1)]
    for given, expected in ((references, streams), (streams[0], streams[:1])):
        assert corpus_score("bleu", captions, given) == sacrebleu.corpus_bleu(captions, expected).score
        assert corpus_score("chrf", captions, given) == sacrebleu.corpus_chrf(captions, expected, word_order=2).score
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


REFERENCES = [
    "the old man sat on the green bench",
    "a dog runs through the high grass",
    "two children play with a red ball in the park",
    "she reads a book by the window",
    "the train leaves the station at noon",
    "a woman sells fruit at the market",
]
BETTER = [r.replace("the", "a", 1) for r in REFERENCES]
WORSE = [" ".join(reversed(r.split())) for r in REFERENCES]


@pytest.mark.parametrize("score", ["bleu", "chrf"])
def test_each_draw_is_scored_as_its_sentences_would_be(score):
    sums = sentence_statistics(metric := scorer(score), BETTER, REFERENCES).sum(0)
    of_corpus = corpus_score(score, BETTER, REFERENCES)
    assert metric._compute_score_from_stats(sums.tolist()).score == pytest.approx(of_corpus, abs=1e-9)
    test = paired_bootstrap(BETTER, WORSE, REFERENCES, score, resamples=9, seed=3)
    # The same draws, a sentence as often as it was drawn.
    counts = np.random.default_rng(3).multinomial(6, np.full(6, 1 / 6), size=9)
    differences = []
    for drawn in counts:
        texts = [[own[i] for i in np.repeat(np.arange(6), drawn)] for own in (BETTER, WORSE, REFERENCES)]
        differences.append(corpus_score(score, texts[0], texts[2]) - corpus_score(score, texts[1], texts[2]))
    assert (test.low, test.high) == pytest.approx(tuple(np.quantile(differences, (0.025, 0.975))), abs=1e-9)
    assert test.difference == pytest.approx(test.score_a - test.score_b)
    assert test.score_a == pytest.approx(of_corpus)


def test_a_clear_difference_is_significant_and_one_sentence_in_six_is_not():
    test = paired_bootstrap(BETTER, WORSE, REFERENCES)
    assert 0 < test.low < test.difference < test.high
    # No draw of 1000 says the opposite: twice 1 in 1001.
    assert test.p == pytest.approx(2 / 1001)
    turned = paired_bootstrap(WORSE, BETTER, REFERENCES)
    assert (turned.low, turned.high) == pytest.approx((-test.high, -test.low))
    assert turned.p == test.p
    same = paired_bootstrap(BETTER, BETTER, REFERENCES)
    assert (same.difference, same.low, same.high, same.p) == (0, 0, 0, 1)
    # Systems that differ in one sentence agree on every draw without it: (5/6)^6 = 0.33 of them.
    test = paired_bootstrap(REFERENCES, [*REFERENCES[:5], WORSE[5]], REFERENCES)
    assert test.low == 0 < test.difference
    assert test.p == pytest.approx(2 * (5 / 6) ** 6, abs=0.05)


def test_pairs_are_drawn_from_apart_and_several_references_count():
    strata, slices, each = ["en-de"] * 4 + ["en-fr"] * 2, (slice(4), slice(4, 6)), {"en-de": "13a", "en-fr": "char"}
    mean = paired_bootstrap(BETTER, WORSE, REFERENCES, "chrf", strata=strata)
    parts = [paired_bootstrap(BETTER[s], WORSE[s], REFERENCES[s], "chrf").difference for s in slices]
    by_stratum = paired_bootstrap(BETTER, WORSE, REFERENCES, "bleu", each, resamples=1, strata=strata)
    bleu = [corpus_score("bleu", BETTER[s], REFERENCES[s], name) for s, name in zip(slices, each.values(), strict=True)]
    assert by_stratum.score_a == pytest.approx(sum(bleu) / 2)
    assert mean.difference == pytest.approx(sum(parts) / 2)
    assert mean.low < mean.difference < mean.high
    several = [[reference, "another text"] for reference in REFERENCES]
    bleu, chrf = text_differences(BETTER, WORSE, several, "13a", of=" here", over="test images")
    assert (bleu.name, chrf.name, bleu.over) == ("BLEU here", "chrF++ here", "test images")
    expected = [corpus_score("bleu", texts, several) for texts in (BETTER, WORSE)]
    assert bleu.difference == pytest.approx(expected[0] - expected[1])
    assert bleu.method == "paired bootstrap, 1,000 draws"
    with pytest.raises(ValueError, match="got 6 and 5 hypotheses, 6 references"):
        paired_bootstrap(BETTER, WORSE[:5], REFERENCES)
    with pytest.raises(ValueError, match="one at least: got 0 and 0 hypotheses, 0 references"):
        paired_bootstrap([], [], [])
    with pytest.raises(ValueError, match="resamples=0 must be at least 1"):
        paired_bootstrap(BETTER, WORSE, REFERENCES, resamples=0)


def examples(hypotheses, pairs=("en-de",) * 6):
    rows = zip(range(6), pairs, REFERENCES, hypotheses, strict=True)
    return [{"index": i, "pair": p, "reference": r, "hypothesis": h} for i, p, r, h in rows]


def test_saved_tests_are_compared_with_the_mean_of_several_pairs_first():
    alone = compare_sentences(examples(BETTER), examples(WORSE), {"en-de": "13a"})
    assert [d.name for d in alone] == ["BLEU", "chrF++"]
    assert alone[0].difference == pytest.approx(paired_bootstrap(BETTER, WORSE, REFERENCES).difference)
    assert alone[0].method == "paired bootstrap, 1,000 draws"
    pairs, known = ["en-de"] * 4 + ["en-fr"] * 2, dict.fromkeys(["en-de", "de-en", "en-fr"], "13a")
    mean, first, second, *_ = compare_sentences(examples(BETTER, pairs), examples(WORSE, pairs), known)
    assert [d.name for d in (mean, first, second)] == ["BLEU, mean of the pairs", "BLEU en-de", "BLEU en-fr"]
    assert mean.difference == pytest.approx((first.difference + second.difference) / 2)
    with pytest.raises(ValueError, match="not of the same sentences"):
        compare_sentences(examples(BETTER), examples(WORSE)[:5], {"en-de": "13a"})
