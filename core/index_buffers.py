"""Buffers of indices that follow from a module's arguments."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn


class IndexBuffers(nn.Module):
    """A module with int64 buffers that follow from its arguments.

    No ``state_dict`` has them, so that they are filled again wherever they come to life: by ``to_empty``, and when
    weights are loaded with ``assign=True`` into a module made on the meta device.
    """

    def keep_indices(self, **indices: list[Any]) -> None:
        """Register one buffer for each name, with these numbers."""
        self.__dict__["_indices"] = indices
        for name, numbers in indices.items():
            self.register_buffer(name, torch.tensor(numbers, dtype=torch.int64), persistent=False)
        self.register_load_state_dict_post_hook(_place)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self.fill_indices()
        return self

    def fill_indices(self) -> None:
        """Write the numbers again, unless there is no memory for them."""
        for name, numbers in self.__dict__["_indices"].items():
            buffer = self.get_buffer(name)
            if not buffer.is_meta:
                buffer.copy_(torch.tensor(numbers, device="cpu"))


def _place(module: IndexBuffers, keys: Any) -> None:
    """Put buffers that are still on the meta device where the loaded weights are."""
    tensors = itertools.chain(module.parameters(), module.buffers())
    device = next((t.device for t in tensors if not t.is_meta), None)
    for name, numbers in module.__dict__["_indices"].items():
        if device is not None and module.get_buffer(name).is_meta:
            setattr(module, name, torch.tensor(numbers, dtype=torch.int64, device=device))
