"""A captioner behind a URL: an image in, what it shows in words out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from apps.train.answering import Service
from apps.vision.sent_images import example_image, image_schema, sent_pixels


def service(model: Any) -> Service:
    """Return the service of an ``ImageCaptioner``.

    Raises:
        ValueError: the model's checkpoint keeps no encoding.
    """
    encoding = model.encoding
    transform, config = encoding.transform, dataclasses.replace(model.decode, num_best=1)

    def read(item: Mapping[str, Any]) -> Tensor:
        return transform(sent_pixels(item["image"]))

    def predict(images: Sequence[Tensor]) -> list[dict[str, Any]]:
        pixels = torch.stack(list(images))
        # Draws depend on an image's number, and it is the first of its request whatever others are beside it.
        parts = pixels.split(1) if model.decode.method == "sample" else (pixels,)
        return [{"text": best.text} for part in parts for best, *_ in model.captions_of(part, config)]

    item = {
        "title": "Image",
        "description": "An image: the answer is what it shows, in words.",
        "type": "object",
        "required": ["image"],
        "properties": {"image": image_schema()},
        "additionalProperties": False,
        "examples": [{"image": example_image(encoding.image_size)}],
    }
    text = {"type": "string", "description": "The caption."}
    answer = {"title": "Caption", "type": "object", "required": ["text"], "properties": {"text": text}}
    return Service(item, answer, read, predict)
