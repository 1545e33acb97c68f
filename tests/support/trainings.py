"""A training of the tiny module with everything that ``moesaic fit`` adds to it."""

from __future__ import annotations

import csv
import warnings
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from tiny_app import TinyData

import core
from apps.train.checkpoint.checkpoints import AtomicCheckpointIO, BestAndLast
from apps.train.checkpoint.resume import GeneratorState
from apps.train.watch.logs import MetricsCSV

MOE = core.MoEConfig(num_experts=4, router=core.TokenChoice(top_k=2), expert=core.FFN(hidden_dim=8, bias=True))


def trainer(folder: Path, *callbacks, **options) -> Trainer:
    options = {"max_epochs": 1, "logger": MetricsCSV(str(folder)), "log_every_n_steps": 1} | options
    return Trainer(
        callbacks=[GeneratorState(), BestAndLast(str(folder)), *callbacks],
        plugins=[AtomicCheckpointIO()],
        default_root_dir=str(folder),
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        **options,
    )


def fit(module, folder, *callbacks, data=None, ckpt_path=None, **options) -> Trainer:
    made = trainer(folder, *callbacks, **options)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*many workers.*|.*LeafSpec.*")
        made.fit(module, data or TinyData(), ckpt_path=ckpt_path, weights_only=True)
    return made


def rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "metrics.csv") as file:
        return list(csv.DictReader(file))


def load(path: Path) -> dict:
    return torch.load(path, weights_only=True)
