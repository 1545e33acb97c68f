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
from made_once import made_once

sys.path.insert(0, str(Path(__file__).parent))  # for helpers that stand here, as ``ported`` and ``beside``
pytest.register_assert_rewrite("ported", "beside", "families", "hubs")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def mended_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ``NllbMoeExperts`` not take the one-hot choice for numbers of experts, 0 and 1."""

    def forward(self: Any, x_TD: torch.Tensor, chosen_TE: torch.Tensor, gates_TE: torch.Tensor) -> torch.Tensor:
        each = torch.stack([self[f"expert_{e}"](x_TD) for e in range(self.num_experts)], 1)
        return (gates_TE[:, :, None] * each).sum(1)

    nllb = pytest.importorskip("transformers.models.nllb_moe.modeling_nllb_moe")
    monkeypatch.setattr(nllb.NllbMoeExperts, "forward", forward)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a model of transformers, texts, and the runs ``lora``, ``qlora`` and ``finetune``."""
    pytest.importorskip("transformers")
    from hubs import write_runs

    return made_once(tmp_path_factory, "hub", write_runs)
