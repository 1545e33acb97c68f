"""Scores of translations by hand, on two processes, and in the report of a test."""

import csv
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from places import ROOT
from sacrebleu.tokenizers import tokenizer_ja_mecab, tokenizer_ko_mecab
from two_ranks import on_two_ranks

from apps.nlp.pairs import report
from apps.nlp.pairs.report import side_by_side
from apps.nlp.text.scores import corpus_score, scorer
from apps.nlp.text.teacher_forced import Judged
from apps.nlp.translation.metrics import TranslationMetrics, bleu_tokenizers, signatures
from apps.nlp.translation.report import (
    TranslationReport,
    TranslationReportConfig,
    breakdown,
    length_groups,
    write_scores,
)
from apps.report.page import Code, Table
from apps.train.step.pieces import perplexity


def sentence(index: int, hypothesis: str, reference: str, pair: int = 0, nll: float = 0.0, right: int = 0, tokens=4):
    return Judged(index, pair, hypothesis, reference, -1.0, nll, right, tokens)


def test_bleu_is_of_the_corpus_and_the_signature_tells_how():
    hypotheses, references = ["the cat sat on the mat", "no"], ["the cat sat on the mat", "yes indeed"]
    # 6, 5, 4, 3 n-grams right of 7, 5, 4, 3; 7 words for 8: exp(1 - 8/7).
    expected = 100 * math.exp(1 - 8 / 7) * (6 / 7) ** 0.25
    assert corpus_score("bleu", hypotheses, references) == pytest.approx(expected)
    assert math.isnan(corpus_score("bleu", [], []))
    signed = signatures({"en-de": "13a"})
    assert signed["bleu"].startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")
    assert "nc:6|nw:2" in signed["chrf"]
    assert "tok:char" in signatures({"en-de": "char", "fr-de": "char"})["bleu"]
    each = signatures({"en-de": "13a", "en-zh": "zh"})
    assert list(each) == ["bleu_en-de", "bleu_en-zh", "chrf"]
    assert "tok:zh" in each["bleu_en-zh"]
    with pytest.raises(ValueError, match="bleu_tokenize='12a' is not one of 13a, char"):
        scorer("bleu", "12a")


def test_the_target_language_decides_how_bleu_cuts_words(caplog, monkeypatch):
    monkeypatch.setattr(tokenizer_ja_mecab, "MeCab", None)  # as where it is not installed
    for name in ("__init__", "signature"):  # as where it is
        monkeypatch.setattr(tokenizer_ko_mecab.TokenizerKoMecab, name, lambda self: None)
    pairs = ["zh-en", "en-zh_CN", "eng_Latn-zho_Hans", "en-ja", "en-ko", "en-th", "en-de"]
    tokenizers = bleu_tokenizers(pairs)
    assert list(tokenizers.values()) == ["13a", "zh", "zh", "char", "ko-mecab", "char", "13a"]
    assert bleu_tokenizers(pairs) == tokenizers
    warning = "en-ja: BLEU is of characters, not of words: bleu_tokenize='ja-mecab': Japanese tokenization requires"
    assert caplog.text.count(warning) == 1
    assert caplog.text.rstrip().endswith("pip install sacrebleu[ja]")
    with pytest.raises(ValueError, match=r"^bleu_tokenize='ja-mecab': Japanese .* pip install sacrebleu\[ja\]$"):
        bleu_tokenizers(["en-ja"], "ja-mecab")
    assert bleu_tokenizers(["en-zh", "en-de"], {"en-de": "intl"}) == {"en-zh": "zh", "en-de": "intl"}
    assert bleu_tokenizers(["en-zh", "en-de"], "13a") == {"en-zh": "13a", "en-de": "13a"}
    with pytest.raises(ValueError, match="bleu_tokenize names 'en-fr', which is not one of en-zh, en-de"):
        bleu_tokenizers(["en-zh", "en-de"], {"en-fr": "13a"})


def test_several_pairs_are_averaged_and_shown_each():
    metrics = TranslationMetrics(("en-de", "en-fr", "en-cs"))
    metrics.update([sentence(0, "a b c d e", "a b c d e", pair=0)])
    metrics.update([sentence(1, "a b c d x", "a b c d e", pair=1), sentence(2, "v w x y z", "a b c d e", pair=1)])
    values = {name: float(value) for name, value in metrics.compute().items()}
    of_second = corpus_score("bleu", ["a b c d x", "v w x y z"], ["a b c d e"] * 2)
    assert values["bleu_en-de"] == pytest.approx(100)
    assert values["bleu_en-fr"] == pytest.approx(of_second)
    assert values["bleu"] == pytest.approx((100 + of_second) / 2)
    assert "bleu_en-cs" not in values  # no sentence of it
    assert values["chrf"] == pytest.approx((values["chrf_en-de"] + values["chrf_en-fr"]) / 2)
    # Into Chinese characters are scored: all is right, one of seven is missing.
    metrics = TranslationMetrics(("en-de", "en-zh"))
    metrics.update([sentence(0, "a b c d", "a b c d"), sentence(1, "我们今天在家", "我们今天在家里", pair=1)])
    assert float(metrics.compute()["bleu_en-zh"]) == pytest.approx(100 * math.exp(1 - 7 / 6))


def test_token_metrics_are_of_all_tokens_and_a_sentence_that_comes_twice_counts_once():
    metrics = TranslationMetrics(("en-de",))
    rows = enumerate([(1.0, 3, 4), (5.0, 1, 2)])
    metrics.update([sentence(i, "a", "a", nll=n, right=r, tokens=t) for i, (n, r, t) in rows])
    values = {name: float(value) for name, value in metrics.compute().items()}
    assert set(values) == {"bleu", "chrf", "token_accuracy", "perplexity"}
    # 6 nats over 6 tokens, 4 of them right; a mean of the sentences' would be (3/4 + 1/2) / 2.
    assert (values["perplexity"], values["token_accuracy"]) == pytest.approx((math.e, 4 / 6))
    assert perplexity(1e4) == math.inf
    metrics = TranslationMetrics(("en-de",))
    first, second = sentence(0, "a b", "a b"), sentence(1, "c", "d", nll=2.0, tokens=2)
    for batch in ([second], [first], [second]):
        metrics.update(batch)
    assert float(metrics.compute()["perplexity"]) == pytest.approx(math.exp(2 / 6))
    assert metrics.pieces == [first, second]
    metrics.reset()
    metrics.update([first])
    metrics.compute()
    assert metrics.pieces == [first]


def _of_rank(rank: int) -> tuple[dict[str, float], int]:
    metrics = TranslationMetrics(("en-de",))
    metrics.update([sentence(i, f"a b c d {i}", "a b c d 0", nll=float(i)) for i in range(rank, 5, 2)])
    if rank == 1:
        metrics.update([sentence(0, "a b c d 0", "a b c d 0")])  # fills up the round
    return {k: float(v) for k, v in metrics.compute().items()}, len(metrics.pieces)


def test_every_rank_has_the_metrics_of_all(tmp_path):
    ranks = on_two_ranks(_of_rank, tmp_path, ["apps.nlp.translation.metrics"])
    alone = TranslationMetrics(("en-de",))
    alone.update([sentence(i, f"a b c d {i}", "a b c d 0", nll=float(i)) for i in range(5)])
    expected = {k: float(v) for k, v in alone.compute().items()}
    for values, count in ranks:
        assert count == 5
        assert values == pytest.approx(expected)


def test_what_is_heavy_is_imported_where_it_is_used():
    heavy = re.compile(r"^(import|from) (sacrebleu|pyarrow)", re.MULTILINE)
    rooms = ("base", "data", "nets", "nlp", "report", "train", "task")
    files = [path for room in rooms for path in (ROOT / "apps" / room).rglob("*.py")]
    assert [path.name for path in files if heavy.search(path.read_text("utf-8"))] == []
    assert len(files) > 100


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


def test_sentences_are_grouped_and_scored_by_the_words_of_their_references():
    own = [Judged(words, 0, "", " ".join("w" * words), 0.0, 0.0, 0, 1) for words in (1, 2, 3, 5, 6)]
    groups = {name: [s.index for s in of] for name, of in length_groups(own, (2, 5)).items()}
    assert groups == {"1-2": [1, 2], "3-5": [3, 5], "over 5": [6]}
    assert list(length_groups(own[2:3], ())) == ["all"]
    for lengths in ((5, 5), (0, 5)):
        with pytest.raises(ValueError, match=rf"report\.lengths=\({lengths[0]}, 5\) must be ascending numbers of at"):
            TranslationReportConfig(lengths=lengths)
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
    assert [[*row.values()][:2] for row in rows(tmp_path / "lengths.csv")] == [["1-3", "3"], ["over 3", "1"]]
    lines = [json.loads(line) for line in (tmp_path / "sentences.jsonl").read_text().splitlines()]
    of_second = round(scorer("chrf").sentence_score(SENTENCES[1].written, [SENTENCES[1].reference]).score, 2)
    assert lines[1] == {
        **{"sentence": 2, "pair": "en-de", "source": "She reads a long book.", "chrf": of_second, "search_score": -0.5},
        **{"reference": "Sie liest ein langes Buch.", "hypothesis": "Sie liest ein Buch."},
    }
    assert "läuft" in (tmp_path / "sentences.jsonl").read_text()  # no escapes
    signed = dict(line.split(maxsplit=1) for line in (tmp_path / "signatures.txt").read_text().splitlines())
    assert signed["bleu"].startswith("nrefs:1|case:mixed|eff:no|tok:13a")
    by_pair, _, translations = section.parts
    assert (type(by_pair), type(translations)) == (Table, Code)
    assert f"sacreBLEU {signed['bleu']}" in by_pair.title
    out = translations.text
    # Two samples of four: the first and the third.
    assert out.count("hypothesis") == 2
    assert "  source      A dog runs.\n  reference   Ein Hund läuft.\n  hypothesis  Ein Hund läuft.\n" in out
    assert "Vas-y !" in out
    # One pair has no mean, and sources may be unknown.
    section = write_scores(SENTENCES[:2], {"en-de": "13a"}, None, tmp_path, TranslationReportConfig(samples=9))
    assert [row["pair"] for row in rows(tmp_path / "pairs.csv")] == ["en-de"]
    assert "source" not in json.loads((tmp_path / "sentences.jsonl").read_text().splitlines()[0])
    assert (section.parts[-1].text.count("hypothesis"), "  source" in section.parts[-1].text) == (2, False)


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
    assert [[*row.values()][:2] for row in rows(tmp_path / "lengths.csv")] == [["1-6", "2"], ["over 6", "1"]]
    assert "sacreBLEU en-zh nrefs:1" in repr(section)


def test_translations_stand_side_by_side_line_by_line():
    def own(texts):
        return [{"index": i, "pair": "p", "source": f"s{i}", "reference": f"r{i}", "hypothesis": h} for i, h in texts]

    # Of four lines that both have, two: the first and, two further, the third. A fifth that one has alone is none.
    shown = side_by_side({"sparse": own(enumerate("abcde")), "dense": own(enumerate("ABCD"))}, "pair", 2)
    first, second = (
        f"p, sentence {i + 1}\n  source     s{i}\n  reference  r{i}\n  sparse     {a}\n  dense      {a.upper()}"
        for i, a in ((0, "a"), (2, "c"))
    )
    assert shown.rstrip("\n") == f"{first}\n\n{second}"
    assert side_by_side({"sparse": own([(0, "a")])}, "pair", 0) == side_by_side({"sparse": []}, "pair", 3) == ""


@pytest.mark.parametrize("together", [False, True])
def test_a_model_that_needs_all_ranks_is_not_run_by_the_first_one_alone(monkeypatch, caplog, tmp_path, together):
    monkeypatch.setattr("apps.nlp.text.report.needs_all_ranks", lambda module: together)
    monkeypatch.setattr(report, "computed_metrics", lambda module, kind: SimpleNamespace(pieces=SENTENCES))
    loaders = {"test_dataloaders": [["a batch"]], "num_test_batches": [1]}
    trainer = SimpleNamespace(is_global_zero=True, datamodule=None, default_root_dir=str(tmp_path), **loaders)
    with caplog.at_level("INFO"):
        collected = TranslationReport(TranslationReportConfig()).collect(trainer, SimpleNamespace())
    assert collected.batches == ([] if together else ["a batch"])
    assert ("test with --trainer.devices 1" in caplog.text) == together
