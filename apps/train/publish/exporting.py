"""An app's part of ``moesaic export``: its networks as graphs of tensors, and how raw inputs become those tensors.

The ``Task`` of a model says it (``apps.task``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Graph:
    """A network that is exported as one graph.

    Attributes:
        name: "model", or the part if an app has several: "encoder", "decoder", "image_tower".
        network: its ``forward`` takes the tensors of ``inputs`` by position, and returns a tensor or a tuple of them;
            the first one is the raw logits, or the vectors of a tower.
        inputs: tensors of an example by their names in the graph, in the order of ``forward``'s arguments. Normalized:
            the input of the module's own forward. They are made contiguous, as a user's are: machine code of
            AOTInductor assumes the memory layout of the example's inputs, and does not check.
        outputs: names of the outputs.
        dynamic: the axes that may have another length, by input: ``{"image": {0: "batch"}}``. Axes of the same name
            have the same length.
    """

    name: str
    network: nn.Module
    inputs: Mapping[str, Tensor]
    outputs: tuple[str, ...]
    dynamic: Mapping[str, Mapping[int, str]]

    def __post_init__(self) -> None:
        inputs = {name: tensor.contiguous() for name, tensor in self.inputs.items()}
        object.__setattr__(self, "inputs", inputs)


@dataclass(frozen=True)
class Exported:
    """The graphs of a model, and the values for turning a user's inputs into their tensors and back.

    Attributes:
        app: "vision", "tables", "translation", ...: names the script in the docs that reads the file.
        graphs: one, or several that are used together.
        preprocessing: plain values that JSON takes: normalization, class names, vocabularies, special ids. They are
            written into the file's metadata, so that a program without this suite computes the same answers.
        files: larger parts by file name, such as a subword model; they are written next to the graph.
        note: what of the model the graphs leave out, in a sentence; "": nothing.
    """

    app: str
    graphs: tuple[Graph, ...]
    preprocessing: Mapping[str, Any]
    files: Mapping[str, bytes] = field(default_factory=dict)
    note: str = ""
