"""Metrics of translations as one torchmetrics metric, the same on one process or many.

BLEU and chrF++ are sacrebleu's, of detokenised text against the corpus's own references, over the whole corpus at once:
neither is a mean over sentences or batches. sacrebleu is imported where it is used.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from apps.base.messages import one_line, warn_once
from apps.nlp.foreseen import PieceMetrics, token_metrics

log = logging.getLogger(__name__)

Score = Literal["bleu", "chrf"]
SCORES: tuple[Score, ...] = ("bleu", "chrf")


class Sentence(NamedTuple):
    """One sentence of a test, as it was translated.

    Attributes:
        index: its place in the split, from 0: not its line in a file, for pairs of several files stand one after
            another and those with an empty side are left out.
        pair: its language pair's place among the data's.
        hypothesis, reference: text.
        log_prob: the hypothesis's score in the search.
        nll: negative log likelihood of the reference's tokens, in nats, summed.
        right: tokens of the reference that came first when all before them were the reference's.
        tokens: of the reference, its end included.
    """

    index: int  # type: ignore[assignment]  # a sentence has no use for tuple.index
    pair: int
    hypothesis: str
    reference: str
    log_prob: float
    nll: float
    right: int
    tokens: int


def scorer(score: Score, tokenize: str = "13a") -> Any:
    """Return sacrebleu's metric of a name: BLEU cased, or chrF++ (chrF with word bigrams).

    Args:
        score: "bleu" or "chrf".
        tokenize: of BLEU, a name of sacrebleu's.

    Raises:
        ValueError: sacrebleu has no such tokenizer, or lacks the package that it needs.
    """
    from sacrebleu.metrics import BLEU, CHRF

    if score == "chrf":
        return CHRF(word_order=2)
    if tokenize not in BLEU.TOKENIZERS:
        raise ValueError(f"bleu_tokenize={tokenize!r} is not one of {', '.join(sorted(BLEU.TOKENIZERS))}")
    try:
        return BLEU(tokenize=tokenize, force=True)  # else each validation may warn that the corpus is tokenised
    except RuntimeError as error:  # a package that it needs
        raise ValueError(f"bleu_tokenize={tokenize!r}: {one_line(str(error))}") from error


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


def corpus_score(score: Score, hypotheses: Sequence[str], references: Sequence[str], tokenize: str = "13a") -> float:
    """Return BLEU or chrF++ of a corpus, in 0..100; NaN without sentences."""
    if not hypotheses:
        return math.nan
    return float(scorer(score, tokenize).corpus_score(list(hypotheses), [list(references)]).score)


def signature(score: Score, tokenize: str = "13a") -> str:
    """Return how a score is made, as sacrebleu writes it."""
    metric = scorer(score, tokenize)
    metric.corpus_score(["a"], [["a"]])  # before, it does not know how many references there are
    return str(metric.get_signature())


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


class TranslationMetrics(PieceMetrics[Sentence]):
    """BLEU, chrF++, token accuracy and perplexity of a corpus.

    ``compute`` returns ``bleu`` and ``chrf``, with several language pairs their means over the pairs beside
    ``bleu_<pair>`` and ``chrf_<pair>``; ``token_accuracy``, the share of the references' tokens that the model puts
    first after those before them; and ``perplexity``, ``exp`` of the mean negative log likelihood of a token.

    Args:
        pairs: language pairs, in the order of their numbers.
        tokenize: of BLEU, see `bleu_tokenizers`.

    Attributes:
        sentences: of all ranks, by ``index``; after ``compute``.
    """

    higher_is_better = True

    def __init__(self, pairs: Sequence[str], tokenize: str | Mapping[str, str] | None = None) -> None:
        super().__init__()
        self.pairs, self.tokenizers = tuple(pairs), bleu_tokenizers(pairs, tokenize)
        self.sentences: list[Sentence] = []

    def reset(self) -> None:
        super().reset()
        self.sentences = []

    def values_of(self, pieces: Sequence[Sentence]) -> dict[str, float]:
        self.sentences = list(pieces)
        return corpus_metrics(self.sentences, self.tokenizers)


def corpus_metrics(sentences: Sequence[Sentence], tokenizers: Mapping[str, str]) -> dict[str, float]:
    """Return what ``TranslationMetrics.compute`` does, as plain numbers.

    Args:
        sentences: of all pairs.
        tokenizers: BLEU's, of each pair, in the order of their numbers.
    """
    by_pair = {name: [s for s in sentences if s.pair == number] for number, name in enumerate(tokenizers)}
    by_pair = {name: own for name, own in by_pair.items() if own}
    values: dict[str, float] = {}
    for score in SCORES:
        of_pairs = {
            name: corpus_score(score, [s.hypothesis for s in own], [s.reference for s in own], tokenizers[name])
            for name, own in by_pair.items()
        }
        values[score] = sum(of_pairs.values()) / len(of_pairs) if of_pairs else math.nan
        if len(tokenizers) > 1:
            values |= {f"{score}_{name}": value for name, value in of_pairs.items()}
    return {**values, **token_metrics(sentences)}
