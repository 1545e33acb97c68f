"""A sparse run and two dense ones of other weights."""

from __future__ import annotations

from pathlib import Path

import pytest
from converted import DIGITS, MOE, classifier, write_run

OVERLAY = """
model:
  moe:
    num_experts: 2
    router: {class_path: core.TokenChoice, init_args: {top_k: 2}}
"""
ONE_UPDATE = """
model:
  moe:
    num_experts: 1
    router: {class_path: core.TokenChoice, init_args: {top_k: 1}}
    expert: {class_path: core.LoRA, init_args: {rank: 2}}
"""
UPDATES = OVERLAY + "    expert: {class_path: core.LoRA, init_args: {rank: 2}}\n"


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs ``sparse``, ``dense`` and ``other``, and the overlays ``moe.yaml``, ``lora.yaml`` and
    ``one_update.yaml``."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "moe.yaml").write_text(OVERLAY)
    (folder / "lora.yaml").write_text(UPDATES)
    (folder / "one_update.yaml").write_text(ONE_UPDATE)
    write_run(folder / "sparse", classifier(MOE), DIGITS)
    write_run(folder / "dense", classifier(None), DIGITS)
    write_run(folder / "other", classifier(None, seed=1), DIGITS)
    return folder
