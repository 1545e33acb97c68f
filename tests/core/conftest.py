"""Every test of the engine starts from the same seed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Nothing that another test compiled is left, nor what this one compiles."""
    import torch._dynamo

    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
