"""A sparse run, two dense ones of other weights, and one without a feed-forward network."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from converted import DIGITS, MOE, classifier, write_run

from apps.vision.conv import ConvConfig
from apps.vision.module import VisionClassifier

CONV = ConvConfig(widths=(4, 8))
LORA = {"class_path": "core.LoRA", "init_args": {"rank": 2}}


def overlay(num_experts: int, **more: object) -> str:
    """Return the overlay of layers whose tokens take all experts."""
    router = {"class_path": "core.TokenChoice", "init_args": {"top_k": num_experts}}
    return yaml.safe_dump({"model": {"moe": {"num_experts": num_experts, "router": router, **more}}})


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs ``sparse``, ``dense``, ``other`` and ``conv``, and the overlays ``moe.yaml``,
    ``lora.yaml`` and ``one_update.yaml``."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "moe.yaml").write_text(overlay(2))
    (folder / "lora.yaml").write_text(overlay(2, expert=LORA))
    (folder / "one_update.yaml").write_text(overlay(1, expert=LORA))
    write_run(folder / "sparse", classifier(MOE), DIGITS)
    write_run(folder / "dense", classifier(None), DIGITS)
    write_run(folder / "other", classifier(None, seed=1), DIGITS)
    write_run(folder / "conv", VisionClassifier(conv=CONV, moe_blocks=[1], image_size=8, report=None), DIGITS)
    return folder
