"""Search for images by texts or by images, and texts as classes of images."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apps.base.checks import check_at_least
from apps.base.messages import excerpt
from apps.base.progress import each
from apps.data.loader import in_order
from apps.data.text_files import clean
from apps.multimodal.pairs.encoding import TextEncoding
from apps.multimodal.pairs.given import TOP, GivenInputs
from apps.multimodal.search.image_index import ImageIndex, model_digest, refreshed
from apps.multimodal.search.page import Hits, write_search_page
from apps.multimodal.search.vectors import (
    FolderImages,
    check_list,
    encode_images,
    encode_texts,
    readable,
    vectors_of_pixels,
)
from apps.nets.exact_search import exact_search
from apps.train.checkpoint.contents import fingerprint
from apps.train.publish.predicting import Prediction, PredictionStream
from core.convert.read.calls import evaluating

log = logging.getLogger(__name__)

_AT_ONCE = 64


class ImageSearch:
    """The search of ``moesaic predict``: nothing is computed before the first result is asked for.

    Args:
        model: as in ``vectors.encode_images``.
        given: the images and the queries.
        cache: the cache's folder.
        num_workers: processes that read images.
    """

    def __init__(self, model: Any, given: GivenInputs, cache: Path, num_workers: int = 0) -> None:
        self.model, self.given, self.cache, self.num_workers = model, given, cache, num_workers

    def stream(self) -> PredictionStream:
        """Return the search as predictions, one for each query, with a page."""
        given = self.given
        made_of = {
            "input": [str(given.folder.resolve()), *given.queries],
            "top": given.top,
            "by": "text" if given.query_image is None else "image",
        }
        queries = len(given.queries)
        return PredictionStream(
            self.predictions, lambda: queries, made_of, queries, file="search.jsonl", page=self.write_page
        )

    @cached_property
    def index(self) -> ImageIndex:
        """The vectors of the folder's images."""
        return index_of(self.model, self.given, self.cache, self.num_workers)

    @cached_property
    def hits(self) -> list[Hits]:
        """The best images of each query."""
        given = self.given
        is_image = given.query_image is not None
        queries = given.queries  # first: a query that cannot be read is rejected before a folder is encoded
        if is_image:
            queries = tuple(str(Path(path).expanduser()) for path in queries)
            query_ND = encode_images(self.model, queries)
        else:
            query_ND = encode_texts(self.model, _fitting(queries, self.model.encoding.text))
        best = exact_search(query_ND, self.index.vectors_ND, given.top or TOP)
        paths = [str(given.folder / path) for path in self.index.paths]
        return [
            Hits(query, is_image, tuple(paths[i] for i in place_K), tuple(score_K))
            for query, place_K, score_K in zip(queries, best.place_BK.tolist(), best.score_BK.tolist(), strict=True)
        ]

    def predictions(self, start: int) -> Iterator[Prediction]:
        """Yield the best images of each query from number ``start`` on."""
        several = len(self.given.queries) > 1
        for number, hits in enumerate(self.hits[start:], start):
            paths = [readable(path) for path in hits.paths]
            row = {
                "index": number,
                "query_image" if hits.is_image else "query": hits.query,
                "path": paths,
                "score": [round(score, 6) for score in hits.scores],
            }
            before = f"{number + 1}\t" if several else ""
            texts = [f"{before}{score:.4f}\t{path}" for path, score in zip(paths, hits.scores, strict=True)]
            yield Prediction(number, row, texts)

    def write_page(self, path: Path) -> None:
        """Write the page of thumbnails."""
        count = len(self.index)
        write_search_page(self.hits, path, f"{count:,} images of {self.given.folder.resolve()} were searched.")


def index_of(model: Any, given: GivenInputs, cache: Path, num_workers: int = 0) -> ImageIndex:
    """Return the vectors of a folder's images as they are now; only new and changed images are encoded."""
    folder, encoding = given.folder, model.encoding

    def encode(paths: Sequence[str]) -> Iterable[tuple[list[int], Tensor, list[str]]]:
        images = FolderImages(folder, paths, encoding, given.on_bad_image)
        loader = in_order(images, _AT_ONCE, num_workers)
        with evaluating(model), torch.no_grad():
            for batch in each(loader, f"encoding {len(paths):,} images"):
                yield batch.index, vectors_of_pixels(model, batch.pixels), batch.complaints

    path = None if given.index is None else Path(given.index).expanduser()
    return refreshed(folder, path, cache, model_digest(fingerprint(model), encoding), encode)


def _fitting(queries: Sequence[str], encoding: TextEncoding) -> list[str]:
    """Return the texts cleaned, and say of which ones the model reads only the beginning."""
    texts = [clean(query) for query in queries]
    for number, text in enumerate(texts, 1):
        length = len(replace(encoding, max_tokens=4 * len(text) + 2).ids(text))
        if length > encoding.max_tokens:
            log.warning(
                "query %d of %d has %s subwords: the model reads the first %d (max_tokens)",
                *(number, len(texts), f"{length:,}", encoding.max_tokens),
            )
    return texts


# ---- texts as classes


@dataclass(frozen=True)
class MatchedImage:
    """The text that fits one image best; ``pandas.DataFrame`` makes a table of a list of them.

    Attributes:
        path: file of the image; None if the image was given itself.
        text: the text that fits it best.
        probability: probability of that text, to 6 places.
        top: probabilities of the best texts, best first.
    """

    path: str | None
    text: str
    probability: float
    top: dict[str, float]


def match(model: Any, images: Sequence[Any], texts: Sequence[str], top: int) -> list[MatchedImage]:
    """Return the texts that fit each image best, as classes that no training has seen.

    Args:
        model: as in ``vectors.encode_images``, whose ``loss`` has ``probabilities(image_ND, text_CD)``, (N, C).
        images: paths, images of Pillow's, or uint8 arrays (H, W) or (H, W, 3), mixed as you like.
        texts: the classes in words, such as "a photo of a red dress".
        top: number of texts to name for each.

    Raises:
        ValueError: an image that cannot be read, no text, an empty one, a text twice, or ``top`` below 1.
    """
    check_at_least(1, top=top)
    check_list("texts", texts)
    if not texts:
        raise ValueError("texts is empty: give at least one text, such as 'a photo of a red dress'")
    twice = next((text for i, text in enumerate(texts) if text in texts[:i]), None)
    if twice is not None:
        raise ValueError(f"texts have {excerpt(twice)} twice: give each class once")
    image_ND, text_CD = encode_images(model, images), encode_texts(model, texts)
    matched = []
    for image, shares in zip(images, shares_of(model, image_ND, text_CD, texts, top), strict=True):
        text, share = next(iter(shares.items()))
        matched.append(MatchedImage(str(image) if isinstance(image, (str, Path)) else None, text, share, shares))
    return matched


def shares_of(model: Any, image_ND: Tensor, text_CD: Tensor, texts: Sequence[str], top: int) -> list[dict[str, float]]:
    """Return the probabilities of the texts that fit each image best, to 6 places, by text and best first.

    Args:
        model: as in ``match``.
        image_ND, text_CD: vectors of the images and of the texts.
        texts: the texts.
        top: number of texts to name for each.
    """
    with torch.no_grad():
        share_NC = model.loss.probabilities(image_ND.to(model.device), text_CD.to(model.device))
    best = share_NC.float().cpu().topk(min(top, len(texts)), dim=1)
    return [
        {texts[c]: round(p, 6) for c, p in zip(places, values, strict=True)}
        for places, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]
