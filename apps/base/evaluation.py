"""A model in evaluation for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


@contextlib.contextmanager
def in_evaluation(model: nn.Module) -> Iterator[None]:
    """Put ``model`` into evaluation mode inside; afterwards each of its parts is in the mode it had."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
