"""Other people's layers beside ours: same weights in, same numbers out. Each test is skipped where its peer is absent.

They need no network and no trained weights. How to run them (peers in a folder of their own, since no app needs them)::

    pip install --target peers --no-deps transformers tokenizers regex st-moe-pytorch colt5-attention soft-moe-pytorch \
        einops beartype PEER-pytorch einx frozendict deepctr-torch open_clip_torch ftfy wcwidth torch-rechub
    PYTHONPATH=peers python -m pytest tests/peers -n 0

Where a peer is wrong, a test asserts its value and ours side by side, and is skipped once the peer gives ours.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # for helpers that stand here, as ``ported`` and ``beside``
pytest.register_assert_rewrite("ported", "beside")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run the tests of ``ported.Ported`` on each of the module's ``CASES``."""
    if {"pair", "double_pair"} & set(metafunc.fixturenames):
        metafunc.parametrize("name", metafunc.module.CASES)


@pytest.fixture
def pair(request: pytest.FixtureRequest, name: str) -> Any:
    from ported import Pair

    return Pair.of(request.module.peer(name))


@pytest.fixture
def double_pair(request: pytest.FixtureRequest, name: str) -> Any:
    from ported import Pair, double

    return Pair.of(double(request.module.peer(name)))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
