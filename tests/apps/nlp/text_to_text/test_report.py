"""The test report: a row for each task and system, and the extractive baselines."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from apps.nlp.pairs.report import Collected, PairReportConfig
from apps.nlp.text.foreseen import Judged
from apps.nlp.text_to_text.metrics import METRICS
from apps.nlp.text_to_text.report import TextToTextReport, extracted, sentences, textrank

SOURCES = [
    "A dog runs. It is black. The dog is fast.",
    "Red wine is sold here. It comes from France! Wine from France is red.",
    "Which one",
]
REFERENCES, WRITTEN = ["A dog runs", "red wine", "that one"], ["a fast dog", "red wine", "that"]


def collected(folder: Path) -> Collected:
    rows = [{"source": s, "references": [r]} for s, r in zip(SOURCES, REFERENCES, strict=True)]
    pieces = [
        Judged(
            i, i // 2, WRITTEN[i], REFERENCES[i], -0.5, 1.0, 1, 2, {"rouge_l": METRICS["rouge_l"](WRITTEN[i], rows[i])}
        )
        for i in range(3)
    ]
    module = SimpleNamespace(tasks=("shorten", "answer"), metrics=("rouge_l",))
    data = SimpleNamespace(rows=lambda split: rows)
    return Collected(SimpleNamespace(pieces=pieces), module, (), SOURCES, folder, data)


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
