"""The model in use: an image in, its likeliest digits out."""

from __future__ import annotations

from typing import Any

import torch

from apps.task import Sizes, Task, Trial
from apps.task.outputs import classes, top_classes
from apps.train.publish.exporting import Exported, Graph
from apps.vision.encoding import normalize
from apps.vision.image_input import image_input
from linear.data import ENCODING


class LinearTask(Task):
    app, noun, verb = "vision", "Image", "Classify"
    description = "An image of a digit: the answer is which one."
    instructions = "Drop an image of a digit."
    inputs, output = {"image": image_input(ENCODING)}, classes()

    @torch.no_grad()
    def answers(self, examples: Any, most: int = 1) -> list[dict[str, float]]:
        image = normalize(torch.stack([example["image"] for example in examples]), ENCODING.mean, ENCODING.std)
        return top_classes(self.model(image), ENCODING.class_names, 3)

    def exported(self) -> Exported:
        image = {"image": torch.randn(2, 1, 8, 8)}
        graph = Graph("model", self.model.model, image, ("logits",), {"image": {0: "batch"}})
        return Exported(self.app, (graph,), ENCODING.state())

    @classmethod
    def trial(cls, model: Any, sizes: Sizes, dtype: torch.dtype) -> Trial:
        image = torch.empty(sizes.examples(), 1, 8, 8, device="meta", dtype=dtype)
        return Trial(lambda: model(image), len(image), len(image), unit="images")


TASK = LinearTask
