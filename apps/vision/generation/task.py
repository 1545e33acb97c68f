"""A generator in use: takes a class, a seed and a guidance, returns an image and the experts of its patches."""

from __future__ import annotations

import base64
import dataclasses
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

import core
from apps.report.exhibit import Example, Images, LayerPart, NumberField
from apps.task import MOST_EXPERTS, Input, Output, Sizes, Task, Trial, choice, number, patches_by_layer
from apps.task.outputs import properties
from apps.train.publish.exporting import Exported, Graph
from apps.vision.generation.data import Wanted
from apps.vision.generation.diffusion import bands, fixed_levels
from apps.vision.generation.files import to_image
from apps.vision.image_files import to_array
from apps.vision.report import patch_experts
from apps.vision.task import ImageClassification
from core.convert.read.calls import evaluating

_LARGEST_SEED = 2**31 - 1
_MOST_GUIDANCE = 20.0


def _guidance(default: float) -> Input:
    says = "Guidance: 1 is the model itself, above 1 images are more typical of their class."
    schema = {"type": "number", "minimum": 0, "maximum": _MOST_GUIDANCE, "default": default, "description": says}
    field = NumberField("Guidance", default, least=0, most=_MOST_GUIDANCE)
    return Input(schema, default, field=field, is_required=False, default=default)


def _image() -> Output:
    """Return an image; an answer is its pixels, uint8 (H, W) or (H, W, 3)."""
    schema = properties("Image", image={"type": "string", "contentEncoding": "base64", "contentMediaType": "image/png"})

    def to_json(pixels: np.ndarray) -> dict[str, str]:
        file = io.BytesIO()
        to_image(torch.from_numpy(pixels if pixels.ndim == 3 else pixels[..., None]).permute(2, 0, 1)).save(file, "PNG")
        return {"image": base64.b64encode(file.getvalue()).decode()}

    return Output(schema, to_json, lambda pixels: (Images("The image", (("", pixels),)),))


class ImageGeneration(Task):
    """The use of an ``ImageGenerator``."""

    app, noun, verb = "generation", "Image", "Draw"
    description = "A class and a seed: the answer is an image of that class, as PNG."
    instructions = (
        "Choose a class: the model draws an image of it, and shows which expert took each patch in the last step."
    )

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.names = model.encoding.class_names
        guided = {} if model.null_class is None else {"guidance": _guidance(model.sampling.guidance)}
        self.inputs = {
            "class_name": choice("Class", self.names, "The class to draw."),
            "seed": number("Seed", 0, 0, 0, _LARGEST_SEED, "Seed of the noise: equal seeds give equal images."),
            **guided,
        }
        self.output = _image()

    def answers(self, examples: Sequence[Mapping[str, Any]], most: int = 1) -> list[np.ndarray]:
        # One by one: in one batch an image's last bits would depend on its batch-mates.
        with evaluating(self.model):
            return [self._drawn(example) for example in examples]

    def _drawn(self, example: Mapping[str, Any]) -> np.ndarray:
        guidance = float(example.get("guidance", self.model.sampling.guidance))
        config = dataclasses.replace(self.model.sampling, guidance=guidance)
        label = torch.tensor([self.names.index(example["class_name"])])
        wanted = Wanted(label, torch.zeros_like(label), int(example["seed"]))
        return to_array(self.model.drawn(wanted, config)[0].cpu())

    def layers(self, tape: core.Tape, example: Any, answer: np.ndarray) -> Mapping[str, tuple[LayerPart, ...]]:
        network, last = self.model.model, {entry.name: entry for entry in tape.entries}
        tokens = network.patch_embed.num_patches
        placed = []
        for entry in last.values():
            inside = dataclasses.replace(entry, name=entry.name.removeprefix("model."))
            ids_BHWK = patch_experts(network, inside, entry.routing.num_tokens // tokens, MOST_EXPERTS)
            placed.append((inside, None if ids_BHWK is None else ids_BHWK[:1]))  # after it comes the null class
        return patches_by_layer(placed, answer)

    def examples(self, data: Any, most: int) -> tuple[Example, ...]:
        guided = [self.inputs["guidance"].default] if "guidance" in self.inputs else []
        return tuple(Example(name, (name, 0, *guided)) for name in self.names[:most])

    def exported(self) -> Exported:
        """Return one step as a graph; the sampler around it is a script of the docs."""
        model = self.model
        draw = torch.Generator().manual_seed(0)
        inputs = {
            "image": torch.randn(2, *model.drawn_shape, generator=draw),
            "level": torch.tensor([0.3, 0.7]),
            "label": torch.tensor([0, model.num_classes - 1]),
        }
        dynamic = {name: {0: "batch"} for name in inputs}
        how = {
            "process": model.process,
            "null_class": model.null_class,
            "shape": list(model.drawn_shape),
            "sampling": dataclasses.asdict(model.sampling),
            "encoding": model.encoding.state(),
        }
        return Exported(self.app, (Graph("model", model.model, inputs, ("predicted",), dynamic),), how)

    # ---- without a trained model

    @classmethod
    def encoding_state(cls, exported: Any) -> dict[str, Any]:
        return dict(exported.description.preprocessing["encoding"])

    @classmethod
    def data_arguments(cls, given: Mapping[str, Any], sizes: Sizes) -> dict[str, Any]:
        return ImageClassification.data_arguments(given, sizes)

    @classmethod
    def trial(cls, model: Any, sizes: Sizes, dtype: torch.dtype) -> Trial:
        batch = sizes.examples()
        image = torch.empty(batch, *model.drawn_shape, device="meta", dtype=dtype)
        level = torch.empty(batch, device="meta", dtype=dtype)
        label = torch.empty(batch, device="meta", dtype=torch.int64)
        return Trial(lambda: model.model(image, level, label), batch, batch, unit="images")

    @classmethod
    def tokens(cls, model: Any, entry: Any, batch: Any) -> Mapping[str, Tensor]:
        """Return the class of each image, and the band of its noise level in a test."""
        return {"class": batch.label, "level": bands(fixed_levels(model.process, batch.index).float())}


TASK = ImageGeneration
