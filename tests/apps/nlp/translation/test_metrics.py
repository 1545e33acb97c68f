"""BLEU, chrF++, token accuracy and perplexity: by hand, against sacrebleu itself, on two processes."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import sacrebleu
from places import ROOT
from sacrebleu.tokenizers import tokenizer_ja_mecab, tokenizer_ko_mecab
from two_ranks import on_two_ranks

from apps.nlp.text.foreseen import Judged
from apps.nlp.text.scores import corpus_score, scorer
from apps.nlp.translation.metrics import TranslationMetrics, bleu_tokenizers, signatures
from apps.train.step.pieces import perplexity


def sentence(index: int, hypothesis: str, reference: str, pair: int = 0, nll: float = 0.0, right: int = 0, tokens=4):
    return Judged(index, pair, hypothesis, reference, -1.0, nll, right, tokens)


def test_bleu_by_hand():
    # Words 7 of 8 right, pairs 5 of 7, triples 3 of 6, fours 2 of 5, lengths equal: BLEU is the geometric mean.
    hypothesis, reference = "a b c d e x g h", "a b c d e f g h"
    expected = 100 * (7 / 8 * 5 / 7 * 3 / 6 * 2 / 5) ** 0.25
    assert corpus_score("bleu", [hypothesis], [reference]) == pytest.approx(expected)


def test_bleu_is_of_the_corpus_and_not_a_mean_over_sentences():
    hypotheses, references = ["the cat sat on the mat", "no"], ["the cat sat on the mat", "yes indeed"]
    # 6, 5, 4, 3 n-grams right of 7, 5, 4, 3; 7 words for 8: exp(1 - 8/7).
    expected = 100 * math.exp(1 - 8 / 7) * (6 / 7) ** 0.25
    assert corpus_score("bleu", hypotheses, references) == pytest.approx(expected)


def test_the_scores_are_sacrebleu_s_own_defaults():
    hypotheses, references = ["Ein Hund läuft, schnell.", "Er liest."], ["Ein Hund läuft schnell.", "Sie liest."]
    assert corpus_score("bleu", hypotheses, references) == sacrebleu.corpus_bleu(hypotheses, [references]).score
    plus = sacrebleu.corpus_chrf(hypotheses, [references], word_order=2).score
    assert corpus_score("chrf", hypotheses, references) == plus
    assert math.isnan(corpus_score("bleu", [], []))


def test_the_signature_tells_how():
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


def test_a_translation_into_chinese_is_scored_by_characters():
    metrics = TranslationMetrics(("en-de", "en-zh"))
    metrics.update([sentence(0, "a b c d", "a b c d"), sentence(1, "我们今天在家", "我们今天在家里", pair=1)])
    values = {name: float(value) for name, value in metrics.compute().items()}
    assert values["bleu_en-zh"] == pytest.approx(100 * math.exp(1 - 7 / 6))  # all is right, a character is missing
    assert values["bleu"] == pytest.approx((100 + values["bleu_en-zh"]) / 2)


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


def test_one_pair_has_no_metrics_of_its_own():
    metrics = TranslationMetrics(("en-de",))
    metrics.update([sentence(0, "a", "b")])
    assert set(metrics.compute()) == {"bleu", "chrf", "token_accuracy", "perplexity"}


def test_token_metrics_are_of_all_tokens():
    metrics = TranslationMetrics(("en-de",))
    metrics.update(
        [sentence(0, "a", "a", nll=1.0, right=3, tokens=4), sentence(1, "a", "a", nll=5.0, right=1, tokens=2)]
    )
    values = metrics.compute()
    # 6 nats over 6 tokens, 4 of them right; a mean of the sentences' would be (3/4 + 1/2) / 2.
    assert float(values["perplexity"]) == pytest.approx(math.e)
    assert float(values["token_accuracy"]) == pytest.approx(4 / 6)
    assert perplexity(1e4) == math.inf


def test_a_sentence_that_comes_twice_counts_once_and_the_order_is_that_of_the_lines():
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
    modules = "apps.nlp.translation.module, apps.nlp.language.module, apps.nlp.text.significance"
    heavy = "{'sacrebleu', 'pyarrow'}"  # torchmetrics imports what it finds of the rest
    code = f"import sys, {modules}; print(*{heavy} & set(sys.modules))"
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert process.stdout.split() == []
