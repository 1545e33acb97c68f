"""Metrics of single texts, their means by task, the paired interval of two systems, and the report of a test."""

import csv
import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from apps.nlp.pairs.report import PairReportConfig, TestedPairs
from apps.nlp.text.significance import mean_difference
from apps.nlp.text.teacher_forced import Judged
from apps.nlp.text_to_text.metrics import METRICS, TextMetrics
from apps.nlp.text_to_text.report import TextToTextReport, extracted, sentences, textrank


def value(name: str, prediction: str, *references: str) -> float:
    return METRICS[name](prediction, {"references": list(references)})


@pytest.mark.parametrize(
    ("name", "prediction", "reference", "expected"),
    [
        # Words a b c d beside a c e: 2 in common of 4 and 3: F1 = 2 * (1/2) (2/3) / (1/2 + 2/3) = 4/7.
        ("rouge_1", "A b, c d.", "a c e", 4 / 7),
        # Pairs ab bc cd beside ac ce: none in common; with "a b e": ab, of 3 and 2: F1 = 2 * (1/3) (1/2) / (5/6) = 2/5.
        ("rouge_2", "a b c d", "a c e", 0),
        ("rouge_2", "a b c d", "a b e", 2 / 5),
        # The longest common subsequence of a b c d and d a c is a c: of 4 and 3 words.
        ("rouge_l", "a b c d", "d a c", 4 / 7),
        ("rouge_l", "", "a", 0),
        ("rouge_l", "...", "a", 0),
        ("rouge_1", "größe", "grösse", 0),  # and not the "gr" of both
        ("rouge_1", "словарь русский", "русский", 2 / 3),
        # Two words of equal consonants and other vowels; accents as marks of their own; and of emoji no word is made.
        ("rouge_1", "हिन्दी", "हान्दा", 0),
        ("rouge_1", "cafe\u0301", "cafe\u0300", 0),
        ("rouge_1", "हिन्दी भाषा", "हिन्दी", 2 / 3),
        ("rouge_1", "i ❤\ufe0f 1\ufe0f\u20e3_cat", "i 1 cat", 1),
        # Of five and five characters four are common, in the same order.
        ("rouge_1", "我喜欢猫，red", "我喜欢狗 red", 4 / 5),
        ("rouge_2", "我喜欢猫", "我喜欢狗", 2 / 3),
        ("exact_match", "The Cat!", "cat", 1),
        ("exact_match", "cats", "cat", 0),
        # Of "black cat" and "cat sat here" one word is common: F1 = 2 * (1/2) (1/3) / (5/6) = 2/5.
        ("token_f1", "a black cat", "cat sat here", 2 / 5),
    ],
)
def test_metrics_by_hand(name, prediction, reference, expected):
    assert value(name, prediction, reference) == pytest.approx(expected)


@pytest.mark.parametrize("name", sorted({*METRICS} - {"execution", "valid", "query_match"}))  # those are of queries
def test_the_best_of_several_right_texts_counts_and_the_right_one_has_1(name):
    best = 100 if name == "chrf" else 1
    assert value(name, "one two three four", "nothing", "one two three four") == pytest.approx(best)
    alone = [value(name, "one two", text) for text in ("one two three", "two")]
    assert value(name, "one two", "one two three", "two") == pytest.approx(max(alone))
    assert 0 <= min(alone)


def judged(index: int, group: int, score: float) -> Judged:
    return Judged(index, group, "a", "b", -1.0, nll=2.0, right=1, tokens=2, scores={"rouge_l": score})


def test_means_by_task_have_an_interval_as_wide_as_their_standard_error_says():
    metrics = TextMetrics(["a", "b", "c"], ["rouge_l"])
    metrics.update([judged(0, 0, 1.0), judged(1, 0, 0.0), judged(2, 0, 0.5), judged(3, 1, 0.1)])
    values = {name: float(v) for name, v in metrics.compute().items()}
    assert values == pytest.approx(
        {"rouge_l": 0.3, "rouge_l_a": 0.5, "rouge_l_b": 0.1, "token_accuracy": 0.5, "perplexity": math.e}
    )
    assert math.isnan(TextMetrics(["a"], ["rouge_l"]).values_of([])["rouge_l"])
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


SOURCES = [
    "A dog runs. It is black. The dog is fast.",
    "Red wine is sold here. It comes from France! Wine from France is red.",
    "Which one",
]
REFERENCES, WRITTEN = ["A dog runs", "red wine", "that one"], ["a fast dog", "red wine", "that"]


def collected(folder: Path) -> TestedPairs:
    rows = [{"source": s, "references": [r]} for s, r in zip(SOURCES, REFERENCES, strict=True)]
    scores = [{"rouge_l": METRICS["rouge_l"](text, row)} for text, row in zip(WRITTEN, rows, strict=True)]
    pieces = [Judged(i, i // 2, WRITTEN[i], REFERENCES[i], -0.5, 1.0, 1, 2, scores[i]) for i in range(3)]
    module = SimpleNamespace(tasks=("shorten", "answer"), metrics=("rouge_l",))
    data = SimpleNamespace(rows=lambda split: rows)
    return TestedPairs(SimpleNamespace(pieces=pieces), module, (), SOURCES, folder, data)


def test_scores_stand_beside_those_of_sentences_of_the_source(tmp_path):
    section = TextToTextReport(PairReportConfig(samples=1)).write_scores(collected(tmp_path), tmp_path)
    rows = list(csv.DictReader((tmp_path / "tasks.csv").open()))
    assert [(row["task"], row["system"]) for row in rows] == [
        ("shorten", "model"), ("shorten", "first sentence"), ("shorten", "TextRank"), ("answer", "model")
    ]  # fmt: skip  # sources of one sentence have no baseline
    # "a fast dog" beside "A dog runs": a dog, of 3 and 3; "red wine": all. "A dog runs." is all, and "Red wine is sold
    # here." has 2 of 5 and of 2 words: 2 * (2/5) / (7/5) = 4/7.
    assert [float(row["rouge_l"]) for row in rows[:2]] == pytest.approx([(2 / 3 + 1) / 2, (1 + 4 / 7) / 2])
    assert float(rows[1]["length_ratio"]) == pytest.approx(8 / 5)
    lines = [json.loads(line) for line in (tmp_path / "texts.jsonl").read_text().splitlines()]
    assert lines[1] == {
        "text": 2, "task": "shorten", "source": SOURCES[1], "reference": "red wine", "hypothesis": "red wine",
        "rouge_l": 1.0, "search_score": -0.5,
    }  # fmt: skip
    table, code = section.parts
    assert "shorten: rouge_l +" in table.title
    assert "95 % interval" in table.title
    assert table.rows[0][:4] == ("shorten", "model", "2", "83.33")
    assert code.text.count("hypothesis") == 1


def test_sentences_and_the_most_central_one():
    assert sentences("One. Two? It costs 1.50 euros! ") == ["One.", "Two?", "It costs 1.50 euros!"]
    # The second shares words with both others, which share none.
    own = ["alpha beta gamma", "alpha beta delta epsilon", "delta epsilon zeta"]
    assert textrank(own) == own[1]
    assert textrank(own[:1]) == own[0]
    assert textrank(["...", "!", "?"]) == "..."
    assert extracted(["one sentence", "another. one"]) == {}
