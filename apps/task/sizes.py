"""A forward of a model without data and without values, from only sizes: ``moesaic plan`` measures it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from apps.base.checks import check_at_least
from apps.nets.loss import chunk_rows


class Missing(ValueError):
    """A size that only the data know; the message names the option that says it."""


@dataclass(frozen=True)
class Sizes:
    """Description of data that are not read.

    Attributes:
        data: the configuration's section ``data``, or its class's path, or None.
        batch, tokens, length: examples of a batch, its tokens, tokens of an example; None: as the configuration says.
        columns: columns by their numbers, by the name of the option: ``tables``, ``numbers``, ``histories``, ...
    """

    data: Any = None
    batch: int | None = None
    tokens: int | None = None
    length: int | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)

    def option(self, *names: str) -> Any:
        """Return an option of the data, None if the configuration has none."""
        value: Any = self.data if isinstance(self.data, Mapping) else {}
        for name in ("init_args", *names):
            value = value.get(name) if isinstance(value, Mapping) else None
        return value

    def examples(self, per_example: int = 1, configured: str = "batch_size") -> int:
        """Return the examples of a GPU, given the tokens of one.

        Raises:
            Missing: nothing says them.
            ValueError: the tokens do not make up complete examples.
        """
        if self.tokens is not None:
            if self.tokens % per_example:
                raise ValueError(f"tokens_per_gpu={self.tokens} is not a multiple of an example's {per_example} tokens")
            return self.tokens // per_example
        batch = self.batch or self.option(configured)
        if batch is None:
            raise Missing("the configuration has no batch size: give --batch N or --tokens_per_gpu N")
        check_at_least(1, batch=batch)
        return int(batch)


@dataclass(frozen=True)
class Loss:
    """The cost of a loss over a vocabulary (``apps.nets.loss``).

    Attributes:
        kept: bytes of saved activations, the gradients of both factors.
        working: bytes that it needs for a while: the transposed weight, the part of its gradient that a chunk adds, and
            a chunk's logits and probabilities.
        flops: FLOPs of its matmuls in a forward.
    """

    kept: float = 0.0
    working: float = 0.0
    flops: float = 0.0


@dataclass(frozen=True)
class Trial:
    """A forward of the model without values.

    Attributes:
        run: calls the network with a batch on the meta device, without the loss.
        examples: examples of the batch.
        tokens: tokens of it, which routers see: of a translation one side's tokens, of a table its rows.
        loss: cost of the loss, which is not run.
        unit: name of the tokens.
        remark: what else a plan says of the model; empty for nothing.
    """

    run: Callable[[], Any]
    examples: int
    tokens: int
    loss: Loss = Loss()
    unit: str = "tokens"
    remark: str = ""


def ids_on_meta(*shape: int) -> torch.Tensor:
    """Return integers without values."""
    return torch.empty(shape, dtype=torch.int64, device="meta")


def vocabulary_loss(tokens: int, weight: torch.Tensor, dtype: torch.dtype) -> Loss:
    """Return the cost of a cross-entropy over the rows of ``weight``."""
    V, D = weight.shape
    chunk = chunk_rows(tokens, V) * V
    size = dtype.itemsize
    return Loss((V * D + tokens * D) * float(size), (2 * V * D + 2 * chunk) * float(size), 2.0 * tokens * V * D)
