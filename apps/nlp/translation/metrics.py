"""Metrics of translations as one torchmetrics metric, the same on one process or many.

BLEU and chrF++ are as in ``apps.nlp.text.scores``, of detokenized text against the corpus's own references.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence

from apps.base.messages import warn_once
from apps.nlp.text.scores import SCORES, corpus_score, scorer, signature
from apps.nlp.text.teacher_forced import Judged
from apps.train.step.pieces import PieceMetrics, token_metrics

log = logging.getLogger(__name__)


# sacrebleu's tokenizer for a language, by its code without script and country.
_OF_LANGUAGE = {
    **dict.fromkeys(("zh", "zho", "yue", "cmn"), "zh"),
    **dict.fromkeys(("ja", "jpn"), "ja-mecab"),
    **dict.fromkeys(("ko", "kor"), "ko-mecab"),
    # These have no spaces between words, and sacrebleu no tokenizer: with 13a a sentence would be a word or two.
    **dict.fromkeys(("th", "tha", "lo", "lao", "km", "khm", "my", "mya", "bo", "bod"), "char"),
}


def bleu_tokenizers(pairs: Sequence[str], tokenize: str | Mapping[str, str] | None = None) -> dict[str, str]:
    """Return BLEU's tokenizer for each language pair, a name of sacrebleu's.

    Args:
        pairs: such as "en-de".
        tokenize: one for all, or of some pairs theirs. Where none is given it is "zh" into Chinese, "ja-mecab" into
            Japanese and "ko-mecab" into Korean, or with a warning "char" where the package for these is not installed;
            "char" into Thai, Lao, Khmer, Burmese and Tibetan; and "13a".

    Raises:
        ValueError: sacrebleu has no such tokenizer or lacks a package for it, or ``tokenize`` names another pair.
    """
    if isinstance(tokenize, str):
        scorer("bleu", tokenize)
        return dict.fromkeys(pairs, tokenize)
    given = dict(tokenize or {})
    for pair, name in given.items():
        if pair not in pairs:
            raise ValueError(f"bleu_tokenize names {pair!r}, which is not one of {', '.join(pairs)}")
        scorer("bleu", name)
    return {pair: given.get(pair) or _of_target(pair) for pair in pairs}


def _of_target(pair: str) -> str:
    name = _OF_LANGUAGE.get(pair.partition("-")[2].partition("_")[0], "13a")
    try:
        scorer("bleu", name)
    except ValueError as error:
        warn_once(log, f"{pair}: BLEU is of characters, not of words: {error}")
        return "char"
    return name


def signatures(tokenizers: Mapping[str, str]) -> dict[str, str]:
    """Return the signature of each score by its name, "bleu", "chrf"; of pairs that differ "bleu_en-de", "bleu_en-zh".

    Args:
        tokenizers: BLEU's, of each pair.
    """
    if len(set(tokenizers.values())) < 2:
        bleu = {"bleu": signature("bleu", next(iter(tokenizers.values()), "13a"))}
    else:
        bleu = {f"bleu_{pair}": signature("bleu", name) for pair, name in tokenizers.items()}
    return {**bleu, "chrf": signature("chrf")}


class TranslationMetrics(PieceMetrics[Judged]):
    """BLEU, chrF++, token accuracy and perplexity of a corpus.

    ``compute`` returns ``bleu`` and ``chrf``, with several language pairs their means over the pairs next to
    ``bleu_<pair>`` and ``chrf_<pair>``; ``token_accuracy``, the share of the references' tokens that the model puts
    first after those before them; and ``perplexity``, ``exp`` of the mean negative log likelihood of a token.

    Args:
        pairs: language pairs, in the order of their numbers.
        tokenize: of BLEU, see `bleu_tokenizers`.
    """

    def __init__(self, pairs: Sequence[str], tokenize: str | Mapping[str, str] | None = None) -> None:
        super().__init__()
        self.pairs, self.tokenizers = tuple(pairs), bleu_tokenizers(pairs, tokenize)

    def values_of(self, pieces: Sequence[Judged]) -> dict[str, float]:
        return corpus_metrics(pieces, self.tokenizers)


def corpus_metrics(sentences: Sequence[Judged], tokenizers: Mapping[str, str]) -> dict[str, float]:
    """Return what ``TranslationMetrics.compute`` does, as plain numbers.

    Args:
        sentences: of all pairs.
        tokenizers: BLEU's, of each pair, in the order of their numbers.
    """
    by_pair = {name: [s for s in sentences if s.group == number] for number, name in enumerate(tokenizers)}
    by_pair = {name: own for name, own in by_pair.items() if own}
    values: dict[str, float] = {}
    for score in SCORES:
        of_pairs = {
            name: corpus_score(score, [s.written or "" for s in own], [s.reference for s in own], tokenizers[name])
            for name, own in by_pair.items()
        }
        values[score] = sum(of_pairs.values()) / len(of_pairs) if of_pairs else math.nan
        if len(tokenizers) > 1:
            values |= {f"{score}_{name}": value for name, value in of_pairs.items()}
    return {**values, **token_metrics(sentences)}
