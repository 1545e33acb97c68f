"""Metrics of captions as one torchmetrics metric, the same on one process or many."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from apps.nlp.text.scores import SCORES, corpus_score, signature
from apps.nlp.text.teacher_forced import Judged
from apps.train.step.pieces import PieceMetrics, token_metrics


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


def by_image(pairs: Sequence[Judged]) -> list[CaptionedImage]:
    """Return the images of pairs in the order of their first pairs, each with its first caption and all its texts."""
    of_image: dict[int, list[Judged]] = {}
    for pair in pairs:
        of_image.setdefault(pair.group, []).append(pair)
    images = []
    for image, own in of_image.items():
        written = next(pair for pair in own if pair.written is not None)
        assert written.written is not None
        references = tuple(dict.fromkeys(pair.reference for pair in own))
        images.append(CaptionedImage(image, own[0].index, written.written, references, written.log_prob))
    return images


def num_references(images: Sequence[CaptionedImage]) -> int | None:
    """Return the number of texts that each image has; None if they have different ones."""
    counts = {len(image.references) for image in images} or {1}
    return counts.pop() if len(counts) == 1 else None


def signatures(tokenize: str, references: int | None, lowercase: bool = False) -> Mapping[str, str]:
    """Return how each score is made, as sacrebleu writes it, by its name."""
    return {score: signature(score, tokenize, references, lowercase) for score in SCORES}


class CaptionMetrics(PieceMetrics[Judged]):
    """BLEU, chrF++, token accuracy and perplexity of the captions of a set of images.

    ``compute`` returns ``bleu`` and ``chrf`` of the corpus, each image with all its texts as references;
    ``token_accuracy``, the share of the texts' tokens that the model puts first after those before them; and
    ``perplexity``, ``exp`` of the mean negative log likelihood of a token.

    Args:
        tokenize: of BLEU, a name of sacrebleu's.
    """

    def __init__(self, tokenize: str = "13a") -> None:
        super().__init__()
        self.tokenize = tokenize

    @property
    def images(self) -> list[CaptionedImage]:
        """The images of all ranks; after ``compute``."""
        return by_image(self.pieces)

    def values_of(self, pieces: Sequence[Judged]) -> dict[str, float]:
        images = by_image(pieces)
        captions, references = [image.caption for image in images], [image.references for image in images]
        scores: dict[str, float] = {score: corpus_score(score, captions, references, self.tokenize) for score in SCORES}
        return {**scores, **token_metrics(pieces)}
