"""Paired bootstrap resampling: against sacrebleu on the drawn sentences themselves, and what it says of clear cases."""

from __future__ import annotations

import numpy as np
import pytest

from apps.nlp.text.scores import corpus_score, scorer
from apps.nlp.text.significance import (
    compare_sentences,
    paired_bootstrap,
    sentence_statistics,
    text_differences,
)

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
def test_the_sums_of_the_statistics_are_the_score_of_the_corpus(score):
    metric = scorer(score)
    sums = sentence_statistics(metric, BETTER, REFERENCES).sum(0)
    from_sums = metric._compute_score_from_stats(sums.tolist()).score
    assert from_sums == pytest.approx(corpus_score(score, BETTER, REFERENCES), abs=1e-9)


@pytest.mark.parametrize("score", ["bleu", "chrf"])
def test_each_draw_is_scored_as_its_sentences_would_be(score):
    test = paired_bootstrap(BETTER, WORSE, REFERENCES, score, resamples=9, seed=3)
    # The same draws, a sentence as often as it was drawn.
    counts = np.random.default_rng(3).multinomial(6, np.full(6, 1 / 6), size=9)
    differences = []
    for drawn in counts:
        chosen = np.repeat(np.arange(6), drawn)
        of_a, of_b = (
            corpus_score(score, [hypotheses[i] for i in chosen], [REFERENCES[i] for i in chosen])
            for hypotheses in (BETTER, WORSE)
        )
        differences.append(of_a - of_b)
    assert (test.low, test.high) == pytest.approx(tuple(np.quantile(differences, (0.025, 0.975))), abs=1e-9)
    assert test.difference == pytest.approx(test.score_a - test.score_b)
    assert test.score_a == pytest.approx(corpus_score(score, BETTER, REFERENCES))


def test_a_clear_difference_is_significant_and_its_sign_is_that_of_the_first():
    test = paired_bootstrap(BETTER, WORSE, REFERENCES)
    assert 0 < test.low < test.difference < test.high
    # No draw of 1000 says the opposite: twice 1 in 1001.
    assert test.p == pytest.approx(2 / 1001)
    turned = paired_bootstrap(WORSE, BETTER, REFERENCES)
    assert (turned.low, turned.high) == pytest.approx((-test.high, -test.low))
    assert turned.p == test.p


def test_a_system_does_not_differ_from_itself():
    test = paired_bootstrap(BETTER, BETTER, REFERENCES)
    assert (test.difference, test.low, test.high, test.p) == (0, 0, 0, 1)


def test_one_sentence_in_six_is_not_significant():
    # Systems that differ in one sentence agree on every draw without it: (5/6)^6 = 0.33 of them.
    other = [*REFERENCES[:5], WORSE[5]]
    test = paired_bootstrap(REFERENCES, other, REFERENCES)
    assert test.difference > 0
    assert test.low == 0
    assert test.p == pytest.approx(2 * (5 / 6) ** 6, abs=0.05)


def test_a_seed_gives_the_same_again():
    first, again, other = (paired_bootstrap(BETTER, WORSE, REFERENCES, seed=s) for s in (0, 0, 1))
    assert first == again
    assert first != other


def test_pairs_are_drawn_from_apart_and_their_scores_averaged():
    strata = ["en-de"] * 4 + ["en-fr"] * 2
    mean = paired_bootstrap(BETTER, WORSE, REFERENCES, "chrf", strata=strata)
    parts = [paired_bootstrap(BETTER[s], WORSE[s], REFERENCES[s], "chrf") for s in (slice(4), slice(4, 6))]
    each = {"en-de": "13a", "en-fr": "char"}
    by_stratum = paired_bootstrap(BETTER, WORSE, REFERENCES, "bleu", each, resamples=1, strata=strata)
    bleu = [
        corpus_score("bleu", BETTER[s], REFERENCES[s], name)
        for s, name in zip((slice(4), slice(4, 6)), each.values(), strict=True)
    ]
    assert by_stratum.score_a == pytest.approx(sum(bleu) / 2)
    assert mean.difference == pytest.approx((parts[0].difference + parts[1].difference) / 2)
    assert mean.low < mean.difference < mean.high


def test_both_scores_are_compared_with_several_references():
    several = [[reference, "another text"] for reference in REFERENCES]
    bleu, chrf = text_differences(BETTER, WORSE, several, "13a", of=" here", over="test images")
    assert (bleu.name, chrf.name, bleu.over) == ("BLEU here", "chrF++ here", "test images")
    expected = [corpus_score("bleu", texts, several) for texts in (BETTER, WORSE)]
    assert bleu.difference == pytest.approx(expected[0] - expected[1])
    assert bleu.method == "paired bootstrap, 1,000 draws"


def test_what_is_not_paired_is_refused():
    with pytest.raises(ValueError, match="got 6 and 5 hypotheses, 6 references"):
        paired_bootstrap(BETTER, WORSE[:5], REFERENCES)
    with pytest.raises(ValueError, match="one at least: got 0 and 0 hypotheses, 0 references"):
        paired_bootstrap([], [], [])
    with pytest.raises(ValueError, match="resamples=0 must be at least 1"):
        paired_bootstrap(BETTER, WORSE, REFERENCES, resamples=0)


# ---- two translators: all pairs, and each pair by itself


def examples(hypotheses, pairs=("en-de",) * 6):
    rows = zip(range(6), pairs, REFERENCES, hypotheses, strict=True)
    return [{"index": i, "pair": p, "reference": r, "hypothesis": h} for i, p, r, h in rows]


def test_saved_tests_are_compared_in_bleu_and_chrf():
    differences = compare_sentences(examples(BETTER), examples(WORSE), {"en-de": "13a"})
    assert [d.name for d in differences] == ["BLEU", "chrF++"]
    assert differences[0].difference == pytest.approx(paired_bootstrap(BETTER, WORSE, REFERENCES).difference)
    assert differences[0].method == "paired bootstrap, 1,000 draws"


def test_several_pairs_have_their_mean_first_and_then_each():
    pairs = ["en-de"] * 4 + ["en-fr"] * 2
    differences = compare_sentences(
        examples(BETTER, pairs), examples(WORSE, pairs), dict.fromkeys(["en-de", "de-en", "en-fr"], "13a")
    )
    assert [d.name for d in differences[:3]] == ["BLEU, mean of the pairs", "BLEU en-de", "BLEU en-fr"]
    assert differences[0].difference == pytest.approx((differences[1].difference + differences[2].difference) / 2)


def test_other_sentences_are_refused():
    with pytest.raises(ValueError, match="not of the same sentences"):
        compare_sentences(examples(BETTER), examples(WORSE)[:5], {"en-de": "13a"})
