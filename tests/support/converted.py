"""Runs of small image classifiers with random weights, as a training leaves them, without the training."""

from __future__ import annotations

from pathlib import Path

import torch
import yaml
from lightning.pytorch import Trainer
from small_vit import VIT

import core
from apps.train.step.module import SparseModule
from apps.vision.module import VisionClassifier

EXPERT = core.FFN(hidden_dim=16, bias=True)
MOE = core.MoEConfig(4, core.TokenChoice(top_k=2), EXPERT)
TRAINER = {"accelerator": "cpu", "max_epochs": 1, "limit_train_batches": 1, "limit_val_batches": 1,
           "num_sanity_val_steps": 0}  # fmt: skip
IMAGES = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def classifier(moe: core.MoEConfig | None, seed: int = 0) -> VisionClassifier:
    """Return a classifier of 8x8 digits, two blocks of width 8, the second one with ``moe``."""
    torch.manual_seed(seed)
    return VisionClassifier(VIT, moe, moe_blocks=[1], image_size=8, report=None)


def write_run(folder: Path, module: SparseModule, data: dict[str, object]) -> None:
    """Write a run's checkpoint and its configuration."""
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(folder / "checkpoints" / "best.ckpt")
    model = {"class_path": type(module).__name__, "init_args": dict(module.hparams)}
    config = {"model": model, "data": data, "trainer": TRAINER}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))


DIGITS: dict[str, object] = {
    "class_path": "VisionData",
    "init_args": {"dataset": "digits", "batch_size": 32, "eval_batch_size": 32},
}
