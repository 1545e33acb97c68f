"""Metrics of captions as one torchmetrics metric, the same on one process or many."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from apps.nlp.text.foreseen import PieceMetrics, token_metrics
from apps.nlp.text.scores import SCORES, corpus_score, signature


class Pair(NamedTuple):
    """One image of a test with one of its texts.

    Attributes:
        index: the pair's place in the data.
        image: number of the image; pairs of one image have one.
        caption: the text that the model wrote about the image; None where another pair of the image in its batch has
            it.
        reference: the pair's text.
        log_prob: the caption's score in the search.
        nll: negative log likelihood of the reference's tokens, in nats, summed.
        right: tokens of the reference that came first when all before them were the reference's.
        tokens: of the reference, its end included.
    """

    index: int  # type: ignore[assignment]  # a pair has no use for tuple.index
    image: int
    caption: str | None
    reference: str
    log_prob: float
    nll: float
    right: int
    tokens: int


@dataclass(frozen=True)
class CaptionedImage:
    """An image of a test.

    Attributes:
        image: its number.
        index: place of its first pair in the data.
        caption: the text that the model wrote.
        references: its own texts, each once.
        log_prob: the caption's score in the search.
    """

    image: int
    index: int
    caption: str
    references: tuple[str, ...]
    log_prob: float


def by_image(pairs: Sequence[Pair]) -> list[CaptionedImage]:
    """Return the images of pairs in the order of their first pairs, each with its first caption and all its texts."""
    of_image: dict[int, list[Pair]] = {}
    for pair in pairs:
        of_image.setdefault(pair.image, []).append(pair)
    images = []
    for image, own in of_image.items():
        written = next(pair for pair in own if pair.caption is not None)
        assert written.caption is not None
        references = tuple(dict.fromkeys(pair.reference for pair in own))
        images.append(CaptionedImage(image, own[0].index, written.caption, references, written.log_prob))
    return images


def num_references(images: Sequence[CaptionedImage]) -> int | None:
    """Return the number of texts that each image has; None where they have different ones."""
    counts = {len(image.references) for image in images} or {1}
    return counts.pop() if len(counts) == 1 else None


def signatures(tokenize: str, references: int | None) -> Mapping[str, str]:
    """Return how each score is made, as sacrebleu writes it, by its name."""
    return {score: signature(score, tokenize, references) for score in SCORES}


class CaptionMetrics(PieceMetrics[Pair]):
    """BLEU, chrF++, token accuracy and perplexity of the captions of a set of images.

    ``compute`` returns ``bleu`` and ``chrf`` of the corpus, each image with all its texts as references;
    ``token_accuracy``, the share of the texts' tokens that the model puts first after those before them; and
    ``perplexity``, ``exp`` of the mean negative log likelihood of a token.

    Args:
        tokenize: of BLEU, a name of sacrebleu's.

    Attributes:
        images: of all ranks; after ``compute``.
    """

    higher_is_better = True

    def __init__(self, tokenize: str = "13a") -> None:
        super().__init__()
        self.tokenize = tokenize
        self.images: list[CaptionedImage] = []

    def reset(self) -> None:
        super().reset()
        self.images = []

    def values_of(self, pieces: Sequence[Pair]) -> dict[str, float]:
        self.images = by_image(pieces)
        return {**corpus_metrics(self.images, self.tokenize), **token_metrics(pieces)}


def corpus_metrics(images: Sequence[CaptionedImage], tokenize: str) -> dict[str, float]:
    """Return BLEU and chrF++ of the captions of a set of images, in 0..100; NaN without any."""
    captions, references = [image.caption for image in images], [image.references for image in images]
    return {s: corpus_score(s, captions, references, tokenize) if images else math.nan for s in SCORES}
