"""Calls of a model from outside: in evaluation, under hooks, with a batch of any form, and errors that name a part."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation inside, and each module back in its own mode afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextlib.contextmanager
def hooked(hooks: Iterable[RemovableHandle]) -> Iterator[None]:
    """Remove hooks at the end of the ``with`` block."""
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def naming_module(name: str) -> Iterator[None]:
    """Let a ``ValueError`` inside name the module that it is about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"module {name!r}: {error}") from error.__cause__


def call(model: nn.Module, batch: Any, run: Callable[[nn.Module, Any], Any] | None = None) -> None:
    """Call a model with a batch: by ``run``, else with a mapping's or a sequence's parts, or the batch itself."""
    if run is not None:
        run(model, batch)
    elif isinstance(batch, Mapping):
        model(**batch)
    elif isinstance(batch, (tuple, list)):
        model(*batch)
    else:
        model(batch)
