"""Other people's layers beside ours: same weights in, same numbers out. Each test is skipped where its peer is absent.

They need no network and no trained weights. How to run them (peers in a folder of their own, since no app needs them)::

    pip install --target peers --no-deps transformers tokenizers regex st-moe-pytorch colt5-attention soft-moe-pytorch \
        einops beartype
    PYTHONPATH=peers python -m pytest tests/peers -n 0

Where a peer is wrong, a test asserts its value and ours side by side, and is skipped once the peer gives ours.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # for helpers that stand here, as ``ported``
pytest.register_assert_rewrite("ported")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
