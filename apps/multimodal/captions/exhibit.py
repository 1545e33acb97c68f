"""The demo page of a captioner: an image, its caption, and the experts of the caption's words."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from apps.base.evaluation import in_evaluation
from apps.multimodal.captions.traced import Traced, traced
from apps.nlp.text.words import words_of
from apps.report.exhibit import (
    Answer,
    Example,
    Exhibit,
    ImageField,
    LayerPart,
    Patches,
    Said,
    expert_names,
    layer_names,
    words_by_layer,
)
from apps.report.page import Table
from apps.vision.image_files import to_array, to_pixels
from apps.vision.report import patch_experts

_CANDIDATES = 3
"""Captions that are shown, where the search has so many."""
_MOST_EXPERTS = 2
"""Experts of a patch that are written."""


def exhibit(model: Any, data: Any, most: int) -> Exhibit:
    """Return what the page of an ``ImageCaptioner`` has.

    Args:
        model: the model, in evaluation.
        data: data for examples; None: there are none.
        most: number of examples at most.

    Raises:
        ValueError: the model's checkpoint keeps no subwords.
    """
    encoding = model.encoding

    def answer(values: Sequence[Any]) -> Answer:
        (path,) = values
        pixels = to_pixels(path, "the image")
        config = dataclasses.replace(model.decode, num_best=min(_CANDIDATES, model.decode.width))
        with in_evaluation(model):
            image = model.normalised([to_array(pixels)], encoding)
            hypotheses = model.hypotheses_of(image, config)
            trace = traced(model, image, hypotheses.ids[0][0])
        texts, scores = model.subwords.decode(hypotheses.ids[0], "source"), hypotheses.scores[0]
        parts: list[Any] = [Said("Caption", texts[0] or "(an empty text)")]
        if len(texts) > 1:
            rows = tuple((text, f"{score:.3f}") for text, score in zip(texts[1:], scores[1:], strict=True))
            parts.append(Table(f"Further candidates (the score of the best: {scores[0]:.3f})", ("text", "score"), rows))
        layers = _patches(model, trace, to_array(encoding.transform(pixels)))
        layers |= words_by_layer(trace.of_decoder, words_of(trace.read), "Subwords of the caption, as they are read")
        return Answer(tuple(parts), layers)

    about = "Drop an image: the model writes what it sees, and shows which experts took each subword of that."
    return Exhibit(about, "Describe", (ImageField("Image"),), answer, () if data is None else _examples(data, most))


def _patches(model: Any, trace: Traced, image: np.ndarray) -> dict[str, tuple[LayerPart, ...]]:
    """Return the experts of the patches, for each layer of the encoder that has some."""
    layers: dict[str, tuple[LayerPart, ...]] = {}
    for entry in trace.of_encoder:
        inside = dataclasses.replace(entry, name=entry.name.removeprefix("encoder."))
        ids_1HWK = patch_experts(model.model.encoder, inside, 1, _MOST_EXPERTS)
        if ids_1HWK is not None:
            (name,) = layer_names([inside.name])
            layers[name] = (Patches(image, ids_1HWK[0].cpu().numpy(), expert_names(entry.routing)),)
    return layers


def _examples(data: Any, most: int) -> tuple[Example, ...]:
    """Return validation images, at equal steps, with their texts as labels."""
    batches = iter(data.val_dataloader())
    batch = next(batches, None)
    if batch is None:
        return ()
    first: dict[int, int] = {}
    for row, number in enumerate(batch.image_B.tolist()):
        first.setdefault(number, row)
    rows = list(first.values())[:most]
    pixels = data.pixels(batch.image_B[rows])
    texts = [data.texts[number] for number in batch.caption_B[rows].tolist()]
    return tuple(Example(text, (to_array(image),)) for text, image in zip(texts, pixels, strict=True))
