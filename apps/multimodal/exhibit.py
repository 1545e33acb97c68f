"""The demo page of an image-text model: an image and texts, which fits best, and the experts of patches and pieces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

import core
from apps.base.evaluation import in_evaluation
from apps.multimodal.search import match
from apps.multimodal.use import Rows, layer_name
from apps.multimodal.vectors import encode_texts, vectors_of_pixels
from apps.nlp.text.words import words_of
from apps.report.exhibit import (
    Answer,
    Bars,
    Example,
    Exhibit,
    ImageField,
    Images,
    LayerPart,
    Part,
    Patches,
    Pieces,
    TextField,
    expert_names,
)
from apps.report.page import Table
from apps.vision.encoding import normalize
from apps.vision.image_files import to_pixels

_MOST_EXPERTS = 2
"""Experts of a patch or piece that are written."""
_MOST_TEXTS = 20
_MOST_DRAWN = 4
"""Texts whose experts are shown."""
_SEARCHED, _BEST = 200, 6
"""Images of the data among which a text searches, and the best that are shown."""


def exhibit(model: Any, data: Any, most: int) -> Exhibit:
    """Return what the page of an ``ImageTextRetriever`` has.

    Args:
        model: the model, in evaluation.
        data: data for examples and for images to be searched; None: there are none.
        most: number of examples at most.

    Raises:
        ValueError: the model's checkpoint keeps no encoding.
    """
    encoding = model.encoding
    searched = None if data is None else _Searched(model, data)

    def answer(values: Sequence[Any]) -> Answer:
        path, lines = values
        texts = list(dict.fromkeys(lines.splitlines()))
        if len(texts) > _MOST_TEXTS:
            raise ValueError(f"Texts: {len(texts)} are too many, at most {_MOST_TEXTS} are read")
        pixels = None if path is None else encoding.transform(to_pixels(path, "the image"))
        parts: list[Part] = []
        if pixels is not None:
            (matched,) = match(model, [array_of(pixels)], texts, len(texts))
            parts.append(Bars("Texts for this image", tuple(matched.top.items())))
            parts += _attributes(model, pixels)
        if searched is not None:
            parts.append(searched.images(texts[0]))
        return Answer(tuple(parts), _layers(model, pixels, texts[:_MOST_DRAWN]))

    about = (
        "Give an image and some texts, each on a line: the model says which of them fits, and which expert took each "
    )
    about += (
        "patch and each piece. The first text also searches the validation images." if data is not None else "piece."
    )
    fields = (ImageField("Image", may_be_empty=data is not None), TextField("Texts, one a line", lines=4, by_line=True))
    return Exhibit(about, "Compare", fields, answer, () if data is None else _examples(data, most))


class _Searched:
    """The images that a text searches, which are encoded when they are first asked for.

    Args:
        model: the model.
        data: the data whose validation images they are, or test images where there are none.
    """

    def __init__(self, model: Any, data: Any) -> None:
        self._model, self._data = model, data

    @cached_property
    def _numbers(self) -> Tensor:
        pairs = _pairs(self._data)
        return pairs.image_N[pairs.index].unique()[:_SEARCHED]

    @cached_property
    def _vectors(self) -> Tensor:
        with in_evaluation(self._model), torch.no_grad():
            return vectors_of_pixels(self._model, self._data.pixels(self._numbers))

    def images(self, text: str) -> Images:
        """Return the best images for a text."""
        score_I = self._vectors @ encode_texts(self._model, [text])[0]
        best = score_I.topk(min(_BEST, len(score_I)))
        pixels = self._data.pixels(self._numbers[best.indices])
        rows = tuple(
            (f"{score:.2f}", array_of(image)) for score, image in zip(best.values.tolist(), pixels, strict=True)
        )
        return Images(f"The best of {len(score_I):,} images for {text!r}, with their products", rows)


@torch.no_grad()
def _attributes(model: Any, pixels: Tensor) -> list[Part]:
    """Return the likeliest class of each attribute, as the head predicts it; nothing without a head."""
    encoding = model.encoding
    with in_evaluation(model):
        logits = model.model.attribute_logits(_normalized(model, pixels))
    if not logits:
        return []
    rows = []
    for (name, classes), logits_1C in zip((encoding.attributes or {}).items(), logits, strict=True):
        probability, answer = logits_1C[0].float().softmax(-1).max(-1)
        rows.append((name, classes[int(answer)], f"{100 * float(probability):.1f} %"))
    return [Table("Attributes", ("attribute", "likeliest", "probability"), tuple(rows))]


@torch.no_grad()
def _layers(model: Any, pixels: Tensor | None, texts: Sequence[str]) -> Mapping[str, tuple[LayerPart, ...]]:
    """Return the experts of the image's patches and of the texts' pieces, by layer."""
    text = model.encoding.text
    ids = [text.ids(one) for one in texts]
    towers = model.model.towers
    with in_evaluation(model), core.record(model) as tape:
        image = None if pixels is None else _normalized(model, pixels)
        towers(image, text.encode(texts).to(model.device))
    layers: dict[str, list[LayerPart]] = {}
    for entry in tape.entries:
        rows = Rows.of_entry(entry)
        if rows is None:
            continue
        routing, parts = entry.routing, layers.setdefault(layer_name(entry.name), [])
        names = expert_names(routing)
        grid = rows.patch_experts(routing, towers.num_patches, _MOST_EXPERTS)
        if grid is not None and pixels is not None:
            parts.append(Patches(array_of(pixels), grid[0].numpy(), names))
        for own, experts_LK in zip(ids, rows.piece_experts(routing, _MOST_EXPERTS), strict=False):
            words = tuple(words_of(text.marked(own)))
            title = "".join(" ".join("".join(word) for word in words[1:-1]))
            parts.append(Pieces(title, words, experts_LK[: len(own)].numpy(), names, "pieces"))
    return {name: tuple(parts) for name, parts in layers.items() if parts}


def _normalized(model: Any, pixels: Tensor) -> Tensor:
    encoding = model.encoding
    return normalize(pixels[None].to(model.device), encoding.mean, encoding.std)


def array_of(pixels: Tensor) -> np.ndarray:
    """Return pixels, uint8 (C, H, W), as an array (H, W) or (H, W, 3)."""
    return np.ascontiguousarray(pixels.permute(1, 2, 0).squeeze(-1).numpy())


def _pairs(data: Any) -> Any:
    """Return the validation pairs, or the test pairs where there are none."""
    pairs = data.examples("val")
    return pairs if len(pairs) else data.examples("test")


def _examples(data: Any, most: int) -> tuple[Example, ...]:
    """Return images of different texts, each with its own text and those of the next ones."""
    pairs = _pairs(data)
    places = range(0, len(pairs), max(1, len(pairs) // max(most, 1)))[:most]
    chosen = pairs.index[list(places)]
    pixels, texts = data.pixels(pairs.image_N[chosen]), [data.texts[i] for i in pairs.caption_N[chosen].tolist()]
    examples = []
    for place, image in enumerate(pixels):
        own = dict.fromkeys(texts[(place + step) % len(texts)] for step in range(3))
        examples.append(Example(texts[place], (array_of(image), "\n".join(own))))
    return tuple(examples)
