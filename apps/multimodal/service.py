"""An image-text model behind a URL: the texts that fit an image, or the vector of an image or a text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from apps.base.evaluation import in_evaluation
from apps.multimodal.search import shares_of
from apps.multimodal.vectors import encode_texts, vectors_of_pixels
from apps.task import Service
from apps.vision.image_input import image_input

_MOST_TEXTS, _LONGEST = 100, 2_000
_TOP = 5
"""Texts that are named, as ``ImageTextRetriever.predict`` does."""


def service(model: Any) -> Service:
    """Return the service of an ``ImageTextRetriever``.

    Raises:
        ValueError: the model's checkpoint keeps no encoding.
    """
    encoding = model.encoding
    sent = image_input(encoding)

    def read(item: Mapping[str, Any]) -> dict[str, Any]:
        texts = [*item.get("texts", ()), *([item["text"]] if "text" in item else ())]
        for text in texts:
            if not text.strip():
                raise ValueError("a text is empty")
        pixels = sent.from_json(item["image"], "image") if "image" in item else None
        return {"pixels": pixels, "texts": texts}

    def predict(inputs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        with_image = [one for one in inputs if one["pixels"] is not None]
        image_ID = _vectors(model, [one["pixels"] for one in with_image])
        texts = list(dict.fromkeys(text for one in inputs for text in one["texts"]))
        vector_of = dict(zip(texts, encode_texts(model, texts), strict=True)) if texts else {}
        vectors, answers = iter(image_ID), []
        for one in inputs:
            own_D = None if one["pixels"] is None else next(vectors)
            if own_D is None or not one["texts"]:
                vector_D = vector_of[one["texts"][0]] if own_D is None else own_D
                answers.append({"vector": vector_D.tolist()})
            else:
                text_CD = torch.stack([vector_of[text] for text in one["texts"]])
                (top,) = shares_of(model, own_D[None], text_CD, one["texts"], _TOP)
                answers.append({"text": next(iter(top)), "probability": next(iter(top.values())), "top": top})
        return answers

    return Service(_item(sent), _answer(), read, predict)


def _vectors(model: Any, pixels: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the vectors of scaled images, (N, dim), of no images too."""
    if not pixels:
        return torch.empty(0, 0)
    with in_evaluation(model), torch.no_grad():
        return vectors_of_pixels(model, torch.stack(list(pixels)))


def _item(sent: Any) -> dict[str, Any]:
    text = {"type": "string", "maxLength": _LONGEST, "pattern": r"\S"}
    texts = {"type": "array", "items": text, "minItems": 1, "maxItems": _MOST_TEXTS, "uniqueItems": True}
    image, example = sent.schema, sent.example

    def kind(title: str, **properties: Any) -> dict[str, Any]:
        given = {"type": "object", "required": list(properties), "properties": properties}
        return {"title": title, **given, "additionalProperties": False}

    return {
        "title": "Image and texts",
        "description": "An image and texts: the answer is which text fits. An image or a text alone: its vector.",
        "oneOf": [kind("Compare", image=image, texts=texts), kind("Image", image=image), kind("Text", text=text)],
        "examples": [{"image": example, "texts": ["a red dress", "blue jeans"]}, {"image": example}, {"text": "a hat"}],
    }


def _answer() -> dict[str, Any]:
    share = {"type": "number", "minimum": 0, "maximum": 1}
    fit = {
        "text": {"type": "string", "description": "The text that fits best."},
        "probability": {**share, "description": "Its probability, to 6 places."},
        "top": {"type": "object", "additionalProperties": share, "description": "The best texts, best first."},
    }
    vector = {"type": "array", "items": {"type": "number"}, "description": "Of length 1: a product is a similarity."}
    return {
        "title": "Answer",
        "oneOf": [
            {"type": "object", "required": list(fit), "properties": fit},
            {"type": "object", "required": ["vector"], "properties": {"vector": vector}},
        ],
    }
