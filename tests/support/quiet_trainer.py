"""A Trainer on the CPU that logs, shows and saves nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer


def quiet_trainer(folder: Path, **options: Any) -> Trainer:
    """Return a Trainer whose files lie in ``folder``; ``options`` replace its quiet ones."""
    shown = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    return Trainer(default_root_dir=folder, accelerator="cpu", devices=1, **{**dict.fromkeys(shown, False), **options})
