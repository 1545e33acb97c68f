"""An image classifier behind a URL: an image in, its likeliest classes out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from apps.train.answering import Service
from apps.vision.sent_images import example_image, image_schema, sent_pixels

_TOP = 5
"""Classes that are named, as ``VisionClassifier.predict`` does."""


def service(model: Any) -> Service:
    """Return the service of a ``VisionClassifier``.

    Raises:
        ValueError: the model's checkpoint keeps no classes.
    """
    encoding = model.encoding
    transform, names = encoding.transform, list(encoding.class_names)

    def read(item: Mapping[str, Any]) -> Tensor:
        return transform(sent_pixels(item["image"]))

    def predict(images: Sequence[Tensor]) -> list[dict[str, Any]]:
        answers = []
        for top in model.classify(torch.stack(list(images)), _TOP):
            name, probability = next(iter(top.items()))
            answers.append({"class_name": name, "probability": probability, "top": top})
        return answers

    share = {"type": "number", "minimum": 0, "maximum": 1}
    item = {
        "title": "Image",
        "description": f"An image: the answer is which of {len(names)} classes it is of.",
        "type": "object",
        "required": ["image"],
        "properties": {"image": image_schema()},
        "additionalProperties": False,
        "examples": [{"image": example_image(encoding.image_size)}],
    }
    answer = {
        "title": "Classes",
        "type": "object",
        "required": ["class_name", "probability", "top"],
        "properties": {
            "class_name": {"type": "string", "description": "The likeliest class."},
            "probability": {**share, "description": "Its probability, to 6 places."},
            "top": {"type": "object", "additionalProperties": share, "description": "The likeliest, best first."},
        },
    }
    return Service(item, answer, read, predict)
