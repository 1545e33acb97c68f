"""Captioners for ``moesaic export``: an image encoder, a decoder that reads the next ids, and the texts' subwords."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from apps.nlp.decode.exported import ExportedCaptioner
from apps.nlp.decode.graphs import graphs_with_memory, spelling, writing
from apps.train.exporting import Exported

if TYPE_CHECKING:
    from apps.multimodal.captions.module import ImageCaptioner
    from apps.train.exported import ExportedModel, OnnxGraph


def export(model: ImageCaptioner) -> Exported:
    """Return the graphs, the encoding of images, and what spells the ids of texts; an image counts as ``max_tokens``
    ids in the maximal length of a text.

    Raises:
        ValueError: the model's checkpoint keeps no encoding, or a router of the decoder cannot decide step by step.
    """
    encoding = model.encoding
    image = torch.randn(2, model.in_chans, model.image_size, model.image_size, device=model.device)
    graphs = graphs_with_memory(model.model, "image", image, {0: "batch"}, None)
    spelled, files = spelling(model.subwords)
    how = {"encoding": encoding.state(), "max_tokens": model.max_tokens, **writing(model.model, model.decode)}
    return Exported("captions", graphs, {**spelled, **how}, files)


def attach(model: ImageCaptioner, graphs: Mapping[str, OnnxGraph]) -> None:
    """Let the captioner run exported graphs."""
    model.model = ExportedCaptioner(graphs["encoder"], graphs["decoder"], model.transformer)  # type: ignore[assignment]


def encoding_state(exported: ExportedModel) -> dict[str, Any]:
    """Return the encoding of a checkpoint."""
    return dict(exported.description.preprocessing["encoding"])
