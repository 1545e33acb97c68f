"""What a comparison says of two translators: all pairs, and each pair by itself."""

from __future__ import annotations

import pytest

from apps.nlp.text.significance import paired_bootstrap
from apps.nlp.translation.comparison import compare_sentences

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
    assert [d.is_part for d in differences] == [False, True, True] * 2
    assert differences[0].difference == pytest.approx((differences[1].difference + differences[2].difference) / 2)


def test_other_sentences_are_refused():
    with pytest.raises(ValueError, match="not of the same sentences"):
        compare_sentences(examples(BETTER), examples(WORSE)[:5], {"en-de": "13a"})
