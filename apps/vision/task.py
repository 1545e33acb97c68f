"""An image classifier in use: takes an image, returns its likeliest classes and the experts of its patches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import core
from apps.data.given import GivenConfig, GivenData
from apps.report.exhibit import Example, LayerPart
from apps.task import MOST_EXPERTS, Missing, Sizes, Task, Trial, patches_by_layer
from apps.task.outputs import classes, top_classes
from apps.train.publish.exporting import Exported, Graph
from apps.vision import own_data
from apps.vision.few_shot import hard_labels
from apps.vision.image_files import to_array
from apps.vision.image_input import drawn_images, image_input, images_on_meta
from apps.vision.report import patch_experts
from core.convert.read.calls import evaluating


class ImageClassification(Task):
    """The use of a ``VisionClassifier``."""

    app, noun, verb = "vision", "Image", "Classify"

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.encoding = model.encoding
        self.inputs, self.output = {"image": image_input(self.encoding)}, classes()

    @property
    def description(self) -> str:
        return f"An image: the answer is which of {len(self.encoding.class_names)} classes it is of."

    @property
    def instructions(self) -> str:
        return (
            f"Drop an image: the model says which of its {len(self.encoding.class_names)} classes it is, and which "
            "expert took each patch."
        )

    def answers(self, examples: Sequence[Mapping[str, Tensor]], most: int = 1) -> list[dict[str, float]]:
        return self.classify(torch.stack([example["image"] for example in examples]))

    @torch.no_grad()
    def classify(self, pixels: Tensor, top: int = 5) -> list[dict[str, float]]:
        """Return the likeliest classes of scaled images, uint8 (B, C, S, S); see ``top_classes``."""
        image = self.encoding.normalized(pixels, self.model.device)
        with evaluating(self.model):
            return top_classes(self.model(image), self.encoding.class_names, top)

    def layers(
        self, tape: core.Tape, example: Mapping[str, Tensor], answer: Any
    ) -> Mapping[str, tuple[LayerPart, ...]]:
        return patches_by_layer(placed(self.model.model, tape.entries, "model."), to_array(example["image"]))

    def examples(self, data: Any, most: int) -> tuple[Example, ...]:
        """Return validation images, or test images if there are none, of different classes as far as possible."""
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

    def exported(self) -> Exported:
        """Return the graph, and the encoding of images: a script scales, cuts and normalizes them by it."""
        image = drawn_images(self.model)
        graph = Graph("model", self.model.model, {"image": image}, ("logits",), {"image": {0: "batch"}})
        return Exported(self.app, (graph,), self.encoding.state())

    # ---- without a trained model

    @classmethod
    def encoding_state(cls, exported: Any) -> dict[str, Any]:
        return dict(exported.description.preprocessing)

    @classmethod
    def data_arguments(cls, given: Mapping[str, Any], sizes: Sizes) -> dict[str, Any]:
        """Return size, channels and classes of a dataset's images, if the suite knows them."""
        from apps.data.datasets import find
        from apps.registry import import_datasets

        import_datasets()
        dataset = sizes.option("dataset")
        spec: Any = None if dataset is None else find(str(dataset))
        known = {
            "image_size": sizes.option("image_size") or getattr(spec, "image_size", None),
            "in_chans": getattr(spec, "in_chans", None),
            "num_classes": len(getattr(spec, "class_names", None) or ()) or None,
        }
        missing = [name for name, value in known.items() if value is None and given.get(name) is None]
        if missing:
            raise Missing(f"{missing[0]} comes from the data, which are not read: give --model.{missing[0]} N")
        return {name: value for name, value in known.items() if given.get(name) is None}

    @classmethod
    def trial(cls, model: Any, sizes: Sizes, dtype: torch.dtype) -> Trial:
        if sizes.tokens is not None and sizes.batch is None:
            raise Missing("images have no number of tokens of their own: give --batch N in place of --tokens_per_gpu")
        batch = sizes.examples()
        image = images_on_meta(model, batch, dtype)
        return Trial(lambda: model.model(image), batch, batch, unit="images")

    @classmethod
    def tokens(cls, model: Any, entry: Any, batch: Any) -> Mapping[str, Tensor]:
        """Return the class of each image."""
        return {"class": hard_labels(batch.label)}

    @classmethod
    def own_data(cls, given: GivenData) -> GivenConfig | None:
        return own_data.config_for(given)


def placed(network: Any, entries: Iterable[Any], prefix: str = "") -> list[tuple[Any, Tensor | None]]:
    """Return the passes of a vision transformer on one image, each with the experts of the patches.

    Args:
        network: the ``VMoE``.
        entries: the entries of a tape of a model around it.
        prefix: the network's name in that model, with a dot behind it; other entries are left out.
    """
    inside = [replace(e, name=e.name.removeprefix(prefix)) for e in entries if e.name.startswith(prefix)]
    return [(entry, patch_experts(network, entry, 1, MOST_EXPERTS)) for entry in inside]


TASK = ImageClassification
