"""Experts without memory, which wait for the tensors of a state dict."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import torch

_IS_WANTED: ContextVar[bool] = ContextVar("unloaded_experts", default=False)


@contextlib.contextmanager
def unloaded_experts() -> Iterator[None]:
    """Build the routed experts of every ``MoEConfig`` on the meta device, inside the block and in this thread.

    The rest of a model is made as usual. ``core.offload.loading_experts`` gives such experts their values.
    """
    token = _IS_WANTED.set(True)
    try:
        yield
    finally:
        _IS_WANTED.reset(token)


def device_of_experts() -> contextlib.AbstractContextManager[object]:
    """Return the context in which a layer builds its routed experts."""
    return torch.device("meta") if _IS_WANTED.get() else contextlib.nullcontext()
