"""The apps' public classes by their short names. A class is imported when it is asked for, and not before."""

from __future__ import annotations

import importlib
from typing import Any

MODULES = {
    "VisionClassifier": "apps.vision.module",
    "MultiTaskRecommender": "apps.recsys.module",
    "NextItemRecommender": "apps.recsys.sequence.module",
    "Translator": "apps.nlp.module",
    "LanguageModeler": "apps.nlp.language",
}
"""The models: where each LightningModule is."""

DATA = {
    "VisionData": "apps.vision.data",
    "TableData": "apps.recsys.data",
    "HistoryData": "apps.recsys.sequence.data",
    "TranslationData": "apps.nlp.data",
    "TextData": "apps.nlp.text",
}
"""The data: where each LightningDataModule is."""

TRAINER_PARTS = frozenset(
    {
        "apps.callbacks.BestAndLast",
        "apps.recsys.strategy.TorchRecStrategy",
        "lightning.pytorch.callbacks.EarlyStopping",
        "lightning.pytorch.callbacks.LearningRateMonitor",
        "lightning.pytorch.callbacks.early_stopping.EarlyStopping",
        "lightning.pytorch.callbacks.lr_monitor.LearningRateMonitor",
    }
)
"""Class paths of the trainer's parts that a configuration beside a checkpoint may name."""


def full_path(name: str) -> str | None:
    """Return the class path of an app's class, given by that or by its short name; None where no app has it."""
    module, _, short = name.rpartition(".")
    home = MODULES.get(short) or DATA.get(short)
    return f"{home}.{short}" if home is not None and module in ("", home) else None


def resolve(name: str) -> Any:
    """Import and return the class of an app that ``full_path`` finds.

    Raises:
        KeyError: no app has it.
    """
    path = full_path(name)
    if path is None:
        raise KeyError(name)
    module, _, short = path.rpartition(".")
    return getattr(importlib.import_module(module), short)
