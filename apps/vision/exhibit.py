"""The demo page of an image classifier: an image, its classes, and the experts of its patches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import core
from apps.report.exhibit import Answer, Bars, Example, Exhibit, ImageField, Patches, expert_names, layer_names
from apps.vision.image_files import to_array, to_pixels
from apps.vision.report import patch_experts

_MOST_EXPERTS = 2
"""Experts of a patch that are written."""


def exhibit(model: Any, data: Any, most: int) -> Exhibit:
    """Return what the page of a ``VisionClassifier`` has.

    Args:
        model: the model, in evaluation.
        data: data for examples; None: there are none.
        most: number of examples at most.

    Raises:
        ValueError: the model's checkpoint keeps no classes.
    """
    encoding = model.encoding

    def answer(values: Sequence[Any]) -> Answer:
        (path,) = values
        pixels = to_pixels(path, "the image")
        with core.record(model.model) as tape:
            (classified,) = model.predict([to_array(pixels)])
        image = to_array(encoding.transform(pixels))
        patches = [(entry, patch_experts(model.model, entry, 1, _MOST_EXPERTS)) for entry in tape.entries]
        placed = [(entry, ids_1HWK[0].cpu().numpy()) for entry, ids_1HWK in patches if ids_1HWK is not None]
        names = layer_names([entry.name for entry, _ in placed])
        layers = {
            name: (Patches(image, experts, expert_names(entry.routing)),)
            for name, (entry, experts) in zip(names, placed, strict=True)
        }
        return Answer((Bars("Likeliest classes", tuple(classified.top.items())),), layers)

    about = (
        f"Drop an image: the model says which of its {len(encoding.class_names)} classes it is, and which expert took "
        "each patch."
    )
    examples = () if data is None else _examples(data, most)
    return Exhibit(about, "Classify", (ImageField("Image"),), answer, examples)


def _examples(data: Any, most: int) -> tuple[Example, ...]:
    """Return validation images, or test images where there are none, of different classes as far as may be."""
    splits = data.opened
    images = splits.val if splits.val is not None and len(splits.val) else splits.test
    labels = images.labels[images.index].tolist()
    first: dict[int, int] = {}
    for place, label in enumerate(labels):
        first.setdefault(label, place)
    places = [*first.values(), *(place for place in range(len(labels)) if place not in set(first.values()))][:most]
    pixels, label_B, _ = images.__getitems__(places)
    names = data.class_names
    return tuple(
        Example(names[label], (to_array(image),)) for image, label in zip(pixels, label_B.tolist(), strict=True)
    )
