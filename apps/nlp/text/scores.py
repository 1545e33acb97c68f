"""BLEU and chrF++ of written texts, by sacrebleu.

Both score the whole corpus at once: neither is a mean over texts or batches. sacrebleu is imported where it is used.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

from apps.base.messages import one_line

Score = Literal["bleu", "chrf"]
SCORES: tuple[Score, ...] = ("bleu", "chrf")
References = Sequence[str] | Sequence[Sequence[str]]
"""The right text of each text, or its several right ones."""


def scorer(score: Score, tokenize: str = "13a", lowercase: bool = False) -> Any:
    """Return sacrebleu's metric of a name: BLEU, or chrF++ (chrF with word bigrams).

    Args:
        score: "bleu" or "chrf".
        tokenize: of BLEU, a name of sacrebleu's.
        lowercase: whether letter case does not count.

    Raises:
        ValueError: sacrebleu has no such tokenizer, or lacks the package that it needs.
    """
    from sacrebleu.metrics import BLEU, CHRF

    if score == "chrf":
        return CHRF(word_order=2, lowercase=lowercase)
    if tokenize not in BLEU.TOKENIZERS:
        raise ValueError(f"bleu_tokenize={tokenize!r} is not one of {', '.join(sorted(BLEU.TOKENIZERS))}")
    try:
        # Without force each validation may warn that the corpus is tokenized.
        return BLEU(lowercase, tokenize=tokenize, force=True)
    except RuntimeError as error:  # a package that it needs
        raise ValueError(f"bleu_tokenize={tokenize!r}: {one_line(str(error))}") from error


def corpus_score(score: Score, hypotheses: Sequence[str], references: References, tokenize: str = "13a") -> float:
    """Return BLEU or chrF++ of a corpus, in 0..100; NaN without texts.

    Args:
        score: "bleu" or "chrf".
        hypotheses: N texts that were written.
        references: N right texts, or for each text its several right ones, of which some may have more than others.
        tokenize: of BLEU, a name of sacrebleu's.

    Raises:
        ValueError: a text without a reference, or as ``scorer``.
    """
    if not hypotheses:
        return math.nan
    return float(scorer(score, tokenize).corpus_score(list(hypotheses), streams(references)).score)


def streams(references: References) -> list[list[str | None]]:
    """Return sacrebleu's form: the first references of all texts, the second ones, ...; None if there are fewer.

    Raises:
        ValueError: a text has none.
    """
    rows = [[own] if isinstance(own, str) else list(own) for own in references]
    if not all(rows):
        raise ValueError(f"text {next(i for i, row in enumerate(rows) if not row)} has no reference")
    return [[row[place] if place < len(row) else None for row in rows] for place in range(max(map(len, rows)))]


def signature(score: Score, tokenize: str = "13a", references: int | None = 1, lowercase: bool = False) -> str:
    """Return how a score is made, as sacrebleu writes it.

    Args:
        score: "bleu" or "chrf".
        tokenize: of BLEU, a name of sacrebleu's.
        references: number of references of a text; None if texts have different numbers.
        lowercase: whether letter case does not count.
    """
    metric = scorer(score, tokenize, lowercase)
    # Before it has scored something, it does not know how many references there are.
    metric.corpus_score(["a", "a"], streams([["a"], ["a", "a"]] if references is None else [["a"] * references] * 2))
    return str(metric.get_signature())
