"""The memory that a layer costs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def kept_bytes(layer: nn.Module, x: Tensor, *args: Any) -> int:
    """Return the bytes that the forward ``layer(x, *args)`` keeps for its backward, parameters and ``x`` left out."""
    own = {p.untyped_storage().data_ptr() for p in layer.parameters()} | {x.untyped_storage().data_ptr()}
    seen: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = layer(x, *args)
    del y
    return sum(seen.values())
