"""``moesaic export`` of a LightningModule of the user's own that was made sparse: its ``forward`` is the graph."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from apps.registry import name_of
from apps.train.publish.exporting import Exported, Graph


class OwnTask:
    """The task of a user's module in use: its export."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def exported(self) -> Exported:
        """Return the graph of a module's ``forward`` on its ``example_input_array``, with a batch of any length.

        Raises:
            ValueError: the module has no such example.
        """
        model = self.model
        example = model.example_input_array
        if not isinstance(example, (Tensor, tuple)):
            raise ValueError(
                f"{name_of(type(model))}.example_input_array is no tensor and no tuple of them: set it in the "
                "constructor to a batch of two that forward takes, and that is exported"
            )
        example = (example,) if isinstance(example, Tensor) else example
        inputs = dict(zip(inspect.signature(model.forward).parameters, example, strict=False))
        with torch.no_grad():
            made = model(*inputs.values())
        outputs = ("output",) if isinstance(made, Tensor) else tuple(f"output_{i}" for i in range(len(made)))
        return Exported("own", (Graph("model", model, inputs, outputs, {name: {0: "batch"} for name in inputs}),), {})
