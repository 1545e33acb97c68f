"""The report of a test: groups by hand, what is printed, what is written."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from apps.nlp.pairs import report
from apps.nlp.pairs.report import side_by_side
from apps.nlp.text.foreseen import Judged
from apps.nlp.text.scores import corpus_score, scorer
from apps.nlp.translation.report import (
    TranslationReport,
    TranslationReportConfig,
    breakdown,
    length_groups,
    write_scores,
)
from apps.report.page import Code, Table

PAIRS = {"en-de": "13a", "en-fr": "13a"}
SOURCES = ["A dog runs.", "She reads a long book.", "Go!", "[/b] {x}"]
SENTENCES = [
    Judged(0, 0, "Ein Hund läuft.", "Ein Hund läuft.", -0.1, nll=2.0, right=4, tokens=4),
    Judged(1, 0, "Sie liest ein Buch.", "Sie liest ein langes Buch.", -0.5, nll=4.0, right=4, tokens=6),
    Judged(2, 1, "Vas-y !", "Allez !", -0.9, nll=3.0, right=1, tokens=3),
    Judged(3, 1, "[/b] {x}", "[/b] {y}", -0.2, nll=1.0, right=2, tokens=3),
]


def rows(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_sentences_are_grouped_by_the_words_of_their_references():
    def of(words: int) -> Judged:
        return Judged(words, 0, "", " ".join("w" * words), 0.0, 0.0, 0, 1)

    groups = length_groups([of(n) for n in (1, 2, 3, 5, 6)], (2, 5))
    assert {name: [s.index for s in own] for name, own in groups.items()} == {
        "1-2": [1, 2],
        "3-5": [3, 5],
        "over 5": [6],
    }
    assert list(length_groups([of(3)], ())) == ["all"]


def test_a_group_s_scores_are_those_of_its_sentences_alone():
    first, second = breakdown("pair", {"first": SENTENCES[:2], "none": [], "second": SENTENCES[2:]}, PAIRS)
    assert (first["pair"], second["pair"]) == ("first", "second")
    texts = [s.written for s in SENTENCES[:2]], [s.reference for s in SENTENCES[:2]]
    assert first["bleu"] == pytest.approx(corpus_score("bleu", *texts))
    assert first["chrf"] == pytest.approx(corpus_score("chrf", *texts))
    assert first["token_accuracy"] == pytest.approx(8 / 10)
    assert first["length_ratio"] == pytest.approx(7 / 8)  # words of the hypotheses over those of the references


def test_the_report_is_shown_and_written(tmp_path):
    section = write_scores(SENTENCES, PAIRS, SOURCES, tmp_path, TranslationReportConfig(lengths=(3,), samples=2))
    assert {p.name for p in tmp_path.iterdir()} == {"pairs.csv", "lengths.csv", "sentences.jsonl", "signatures.txt"}
    by_pair = rows(tmp_path / "pairs.csv")
    assert [row["pair"] for row in by_pair] == ["en-de", "en-fr", "mean of the pairs"]
    mean = (float(by_pair[0]["bleu"]) + float(by_pair[1]["bleu"])) / 2
    assert float(by_pair[2]["bleu"]) == pytest.approx(mean)
    assert [(row["words"], row["sentences"]) for row in rows(tmp_path / "lengths.csv")] == [
        ("1-3", "3"),
        ("over 3", "1"),
    ]
    lines = [json.loads(line) for line in (tmp_path / "sentences.jsonl").read_text().splitlines()]
    of_second = round(scorer("chrf").sentence_score(SENTENCES[1].written, [SENTENCES[1].reference]).score, 2)
    assert lines[1] == {
        "sentence": 2,
        "pair": "en-de",
        "source": "She reads a long book.",
        "reference": "Sie liest ein langes Buch.",
        "hypothesis": "Sie liest ein Buch.",
        "chrf": of_second,
        "search_score": -0.5,
    }
    assert "läuft" in (tmp_path / "sentences.jsonl").read_text()  # no escapes
    signed = dict(line.split(maxsplit=1) for line in (tmp_path / "signatures.txt").read_text().splitlines())
    assert signed["bleu"].startswith("nrefs:1|case:mixed|eff:no|tok:13a")
    by_pair, _, translations = section.parts
    assert isinstance(by_pair, Table)
    assert isinstance(translations, Code)
    assert f"sacreBLEU {signed['bleu']}" in by_pair.title
    out = translations.text
    # Two samples of four: the first and the third.
    assert out.count("hypothesis") == 2
    assert "  source      A dog runs.\n  reference   Ein Hund läuft.\n  hypothesis  Ein Hund läuft.\n" in out
    assert "Vas-y !" in out


def test_one_pair_has_no_mean_and_sources_may_be_unknown(tmp_path):
    section = write_scores(SENTENCES[:2], {"en-de": "13a"}, None, tmp_path, TranslationReportConfig(samples=9))
    assert [row["pair"] for row in rows(tmp_path / "pairs.csv")] == ["en-de"]
    assert "source" not in json.loads((tmp_path / "sentences.jsonl").read_text().splitlines()[0])
    translations = section.parts[-1]
    assert isinstance(translations, Code)
    assert translations.text.count("hypothesis") == 2
    assert "  source" not in translations.text


def test_each_pair_is_scored_by_its_tokenizer_and_says_so(tmp_path):
    # As one word of 13a nothing is right; of seven characters six are, in their order.
    other = Judged(4, 1, "他今天在家里。", "她今天在家里。", -0.2, nll=1.0, right=2, tokens=3)
    pairs, config = {"en-de": "13a", "en-zh": "zh"}, TranslationReportConfig(lengths=(6,))
    section = write_scores([*SENTENCES[:2], other], pairs, None, tmp_path, config)
    first, second, mean = rows(tmp_path / "pairs.csv")
    assert ("tok:13a" in first["bleu_signature"], "tok:zh" in second["bleu_signature"]) == (True, True)
    assert mean["bleu_signature"] == f"{first['bleu_signature']}; {second['bleu_signature']}"
    assert corpus_score("bleu", [other.written], [other.reference], "13a") == 0
    # N-grams right: 6 of 7, 5 of 6, 4 of 5, 3 of 4.
    assert float(second["bleu"]) == pytest.approx(100 * (6 / 7 * 5 / 6 * 4 / 5 * 3 / 4) ** 0.25)
    assert float(second["length_ratio"]) == 1
    # Six characters and the stop: 7 words, where spaces make one.
    assert [(row["words"], row["sentences"]) for row in rows(tmp_path / "lengths.csv")] == [
        ("1-6", "2"),
        ("over 6", "1"),
    ]
    assert "sacreBLEU en-zh nrefs:1" in repr(section)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"lengths": (5, 5)}, r"report\.lengths=\(5, 5\) must be ascending"),
        ({"lengths": [0, 5]}, r"report\.lengths=\(0, 5\) must be ascending numbers of at least 1"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        TranslationReportConfig(**options)


def test_translations_stand_side_by_side_line_by_line():
    def own(*hypotheses):
        return [
            {"index": i, "pair": "en-de", "source": f"s{i}", "reference": f"r{i}", "hypothesis": h}
            for i, h in enumerate(hypotheses)
        ]

    # Of four lines that both have, two: the first and, two further, the third. A fifth that one has alone is none.
    shown = side_by_side(
        {"sparse": own("a", "b", "c", "d", "e"), "dense, equal FLOPs": own("A", "B", "C", "D")}, "pair", 2
    )
    assert shown.splitlines() == [
        "en-de, sentence 1",
        "  source              s0",
        "  reference           r0",
        "  sparse              a",
        "  dense, equal FLOPs  A",
        "",
        "en-de, sentence 3",
        "  source              s2",
        "  reference           r2",
        "  sparse              c",
        "  dense, equal FLOPs  C",
    ]
    assert side_by_side({"sparse": own("a")}, "pair", 0) == ""
    assert side_by_side({"sparse": []}, "pair", 3) == ""


@pytest.mark.parametrize("together", [False, True])
def test_a_model_that_needs_all_ranks_is_not_run_by_the_first_one_alone(monkeypatch, caplog, tmp_path, together):
    monkeypatch.setattr("apps.nlp.text.report.needs_all_ranks", lambda module: together)
    monkeypatch.setattr(report, "computed_metrics", lambda module, kind: SimpleNamespace(pieces=SENTENCES))
    trainer = SimpleNamespace(
        is_global_zero=True,
        datamodule=None,
        default_root_dir=str(tmp_path),
        test_dataloaders=[["a batch"]],
        num_test_batches=[1],
    )
    with caplog.at_level("INFO"):
        collected = TranslationReport(TranslationReportConfig()).collect(trainer, SimpleNamespace())
    assert collected.batches == ([] if together else ["a batch"])
    assert ("test with --trainer.devices 1" in caplog.text) == together
