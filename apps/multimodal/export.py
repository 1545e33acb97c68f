"""Models of images and texts for ``moesaic export``: a graph of image vectors and one of text vectors."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from apps.data.subwords import EOS_ID, PAD_ID
from apps.train.exporting import Exported, Graph

if TYPE_CHECKING:
    from apps.multimodal.model import PairModel
    from apps.multimodal.module import ImageTextRetriever
    from apps.train.exported import ExportedModel, OnnxGraph


SUBWORDS = "subwords.model"
"""The sentencepiece model, where texts are cut into subwords."""


def export(model: ImageTextRetriever) -> Exported:
    """Return the graphs "image_tower" and "text_tower", and how images and texts become their inputs.

    The first output of both is "vectors", float32 (B, dim) of length 1; that of images is followed by the logits of
    each attribute, where the model predicts attributes. ``scale`` times the product of two vectors, plus ``bias``, is
    the logit of their pair, of which ``probability`` says whether a softmax over the texts or a sigmoid follows.

    Raises:
        ValueError: the model's checkpoint keeps no encoding.
    """
    encoding = model.encoding
    draw = torch.Generator().manual_seed(0)
    image = torch.randn(2, model.in_chans, model.image_size, model.image_size, generator=draw)
    length = min(5, model.max_tokens)
    text_BL = torch.randint(EOS_ID + 1, max(model.vocab_size, EOS_ID + 2), (2, length), generator=draw)
    text_BL[1, length - 1] = PAD_ID
    attributes = tuple(f"logits_{name}" for name in model.attributes) if model.attribute_head is not None else ()
    image_tower, text_tower = (kind(model.model).train(model.training) for kind in (ImageNetwork, TextNetwork))
    graphs = (
        Graph("image_tower", image_tower, {"image": image}, ("vectors", *attributes), {"image": {0: "batch"}}),
        Graph("text_tower", text_tower, {"text": text_BL}, ("vectors",), {"text": {0: "batch", 1: "length"}}),
    )
    state = encoding.state()
    files = {}
    if encoding.text.subwords is not None:
        files[SUBWORDS] = base64.b64decode(encoding.text.subwords.models[0])
        state["text"]["subwords"] = {**state["text"]["subwords"], "models": [SUBWORDS]}
    loss = {
        "scale": float(model.loss.log_scale.exp()),
        "bias": float(getattr(model.loss, "bias", 0.0)),
        "probability": "sigmoid" if hasattr(model.loss, "bias") else "softmax",
    }
    return Exported("image_text", graphs, {**state, **loss}, files)


def attach(model: ImageTextRetriever, graphs: Mapping[str, OnnxGraph]) -> None:
    """Let the model run exported graphs."""
    model.model = _Pairs(graphs["image_tower"], graphs["text_tower"])  # type: ignore[assignment]


def encoding_state(exported: ExportedModel) -> dict[str, Any]:
    """Return the encoding of a checkpoint."""
    state = dict(exported.description.preprocessing)
    for name in ("scale", "bias", "probability"):
        state.pop(name, None)
    text = dict(state["text"])
    if text["subwords"] is not None:
        models = [base64.b64encode(exported.file(name)).decode() for name in text["subwords"]["models"]]
        text["subwords"] = {**text["subwords"], "models": models}
    return {**state, "text": text}


class ImageNetwork(nn.Module):
    """Normalised images to their vectors and the logits of their attributes.

    Args:
        model: the network of both modalities.
    """

    def __init__(self, model: PairModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Return the vectors (B, dim), and logits (B, C) of each attribute."""
        return self.model.image_outputs(image)


class TextNetwork(nn.Module):
    """Ids of texts to their vectors.

    Args:
        model: the network of both modalities.
    """

    def __init__(self, model: PairModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, text: Tensor) -> Tensor:
        """Return the vectors (B, dim) of texts (B, L), padded with 0."""
        return self.model.text_vectors(text)


class _Pairs(nn.Module):
    """Graphs under the interface of ``PairModel``."""

    def __init__(self, image_tower: OnnxGraph, text_tower: OnnxGraph) -> None:
        super().__init__()
        self.image_tower, self.text_tower = image_tower, text_tower

    def forward(self, image: Tensor, text_BL: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Return the vectors of images and texts, and the logits of the attributes."""
        vectors_BD, *logits = self.image_tower({"image": image})
        return vectors_BD, self.text_vectors(text_BL), tuple(logits)

    def image_vectors(self, image: Tensor) -> Tensor:
        """Return the vectors of images."""
        return self.image_tower({"image": image})[0]

    def text_vectors(self, text_BL: Tensor) -> Tensor:
        """Return the vectors of texts."""
        return self.text_tower({"text": text_BL})[0]

    def attribute_logits(self, image: Tensor) -> tuple[Tensor, ...]:
        """Return the logits of each attribute of images."""
        return self.image_tower({"image": image})[1:]
