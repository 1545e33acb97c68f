"""Metrics of single texts, their means by task, and the paired interval of two systems."""

from __future__ import annotations

import math

import numpy as np
import pytest

from apps.nlp.text.foreseen import Judged
from apps.nlp.text.significance import mean_difference
from apps.nlp.text_to_text.metrics import METRICS, TextMetrics


def value(name: str, prediction: str, *references: str) -> float:
    return METRICS[name](prediction, {"references": list(references)})


def test_rouge_by_hand():
    # Words a b c d beside a c e: 2 in common of 4 and 3: F1 = 2 * (1/2) (2/3) / (1/2 + 2/3) = 4/7.
    assert value("rouge_1", "A b, c d.", "a c e") == pytest.approx(4 / 7)
    # Pairs ab bc cd beside ac ce: none in common; with "a b e": ab, of 3 and 2: F1 = 2 * (1/3) (1/2) / (5/6) = 2/5.
    assert value("rouge_2", "a b c d", "a c e") == 0
    assert value("rouge_2", "a b c d", "a b e") == pytest.approx(2 / 5)
    # The longest common subsequence of a b c d and d a c is a c: of 4 and 3 words.
    assert value("rouge_l", "a b c d", "d a c") == pytest.approx(4 / 7)
    assert value("rouge_l", "", "a") == value("rouge_l", "...", "a") == 0


def test_letters_of_every_script_count():
    assert value("rouge_1", "größe", "grösse") == 0  # and not the "gr" of both
    assert value("rouge_1", "словарь русский", "русский") == pytest.approx(2 / 3)


def test_marks_belong_to_their_letters_and_unspaced_scripts_are_split():
    # Two words of equal consonants and other vowels; accents as marks of their own; and of emoji no word is made.
    assert value("rouge_1", "हिन्दी", "हान्दा") == value("rouge_1", "cafe\u0301", "cafe\u0300") == 0
    assert value("rouge_1", "हिन्दी भाषा", "हिन्दी") == pytest.approx(2 / 3)
    assert value("rouge_1", "i ❤\ufe0f 1\ufe0f\u20e3_cat", "i 1 cat") == 1
    # Of five and five characters four are common, in the same order.
    assert value("rouge_1", "我喜欢猫，red", "我喜欢狗 red") == pytest.approx(4 / 5)
    assert value("rouge_2", "我喜欢猫", "我喜欢狗") == pytest.approx(2 / 3)


def test_answers_by_hand():
    assert value("exact_match", "The Cat!", "cat") == 1
    assert value("exact_match", "cats", "cat") == 0
    # Of "black cat" and "cat sat here" one word is common: F1 = 2 * (1/2) (1/3) / (5/6) = 2/5.
    assert value("token_f1", "a black cat", "cat sat here") == pytest.approx(2 / 5)


@pytest.mark.parametrize("name", sorted({*METRICS} - {"execution", "valid", "query_match"}))  # those are of queries
def test_the_best_of_several_right_texts_counts_and_the_right_one_has_1(name):
    best = 100 if name == "chrf" else 1
    assert value(name, "one two three four", "nothing", "one two three four") == pytest.approx(best)
    alone = [value(name, "one two", text) for text in ("one two three", "two")]
    assert value(name, "one two", "one two three", "two") == pytest.approx(max(alone))
    assert 0 <= min(alone)


def judged(index: int, group: int, score: float) -> Judged:
    return Judged(index, group, "a", "b", -1.0, nll=2.0, right=1, tokens=2, scores={"rouge_l": score})


def test_means_by_task_and_over_the_tasks():
    metrics = TextMetrics(["a", "b", "c"], ["rouge_l"])
    metrics.update([judged(0, 0, 1.0), judged(1, 0, 0.0), judged(2, 0, 0.5), judged(3, 1, 0.1)])
    values = {name: float(v) for name, v in metrics.compute().items()}
    assert values == pytest.approx(
        {"rouge_l": 0.3, "rouge_l_a": 0.5, "rouge_l_b": 0.1, "token_accuracy": 0.5, "perplexity": math.e}
    )
    assert math.isnan(TextMetrics(["a"], ["rouge_l"]).values_of([])["rouge_l"])


def test_an_interval_of_a_mean_is_as_wide_as_its_standard_error_says():
    values = np.random.RandomState(0).normal(0.1, 1.0, 2000)
    r = mean_difference("rouge_l", values.tolist(), [0.0] * 2000, ["a"] * 2000, "texts")
    assert r.difference == pytest.approx(values.mean())
    half = 1.96 * values.std() / 2000**0.5
    assert (r.high - r.low) / 2 == pytest.approx(half, rel=0.1)
    assert r.low < r.difference < r.high
    # Two tasks of 1 and 3 texts: the mean of the tasks' means, 1 and 1/3.
    r = mean_difference("x", [1.0, 1.0, 0.0, 0.0], [0.0] * 4, ["a", "b", "b", "b"], "texts")
    assert r.difference == pytest.approx((1 + 1 / 3) / 2)
    assert r.high <= 1.0
