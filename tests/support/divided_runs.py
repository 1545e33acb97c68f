"""Trainings of a tiny model whose experts are divided among two gloo ranks, and of the same model in one process."""

from __future__ import annotations

import csv
import dataclasses
import logging
import os
import signal
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningDataModule, Trainer
from tiny_app import TinyModule
from torch.utils.data import DataLoader, TensorDataset

import core
from apps.data.loader import ResumableLoader
from apps.train.checkpoint.checkpoints import AtomicCheckpointIO
from apps.train.checkpoint.resume import GeneratorState
from apps.train.sharded.expert_parallel import ExpertParallelStrategy
from apps.train.step.module import OptimizerConfig
from apps.train.watch.logs import MetricsCSV

WORLD = 2
BATCH = 8  # of all ranks together
MOE = core.MoEConfig(
    4, core.TokenChoice(top_k=2), core.FFN(hidden_dim=8, activation="silu"), balance=core.Balance(importance=0.1)
)


def replaced_experts(num_experts: int) -> core.MoEConfig:
    """Return the layer with another number of experts."""
    return dataclasses.replace(MOE, num_experts=num_experts)


class Points(LightningDataModule):
    """24 points in the plane of 3 classes, always the same: 3 batches."""

    def __init__(self, world: int = 1) -> None:
        super().__init__()
        drawn = torch.Generator().manual_seed(0)
        self.points = TensorDataset(torch.randn(24, 2, generator=drawn), torch.arange(24) % 3)
        self.batch_size, self.num_classes = BATCH // world, 3

    def train_dataloader(self) -> ResumableLoader:
        return ResumableLoader(self.points, self.batch_size, seed=0)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.points, self.batch_size)


def model(optimizer: str = "adamw", **options: Any) -> TinyModule:
    """Return the model with the same start each time.

    A large eps: Adam would blow up the rounding of gradients that are nearly 0.
    """
    torch.manual_seed(0)
    config = OptimizerConfig(optimizer, lr=0.05, eps=1e-3, warmup_steps=0, schedule="constant")
    return TinyModule(3, **{"moe": MOE, "dropout": 0.0, "optimizer": config, **options})


class Saves(Callback):
    """The callback writes ``last.ckpt`` at the end of each epoch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        trainer.save_checkpoint(self.folder / "last.ckpt", weights_only=False)


def fit(folder: Path, net: TinyModule, strategy: Any = "auto", world: int = 1, **options: Any) -> Trainer:
    """Train for an epoch, with the log and ``last.ckpt`` in the folder."""
    path = options.pop("ckpt_path", None)
    folder.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = Trainer(
            accelerator="cpu",
            devices=world,
            strategy=strategy,
            default_root_dir=str(folder),
            logger=MetricsCSV(str(folder)),
            callbacks=[GeneratorState(), *options.pop("callbacks", []), Saves(folder)],
            plugins=[AtomicCheckpointIO()],
            enable_progress_bar=False,
            enable_model_summary=False,
            **{"max_epochs": 1, "log_every_n_steps": 1, "num_sanity_val_steps": 0, **options},
        )
        trainer.fit(net, datamodule=Points(world), ckpt_path=path, weights_only=True)
    return trainer


def loaded(folder: Path, path: Path, net: TinyModule, strategy: Any = "auto", world: int = 1) -> None:
    """Load a checkpoint of one epoch for a training that has no epoch left, and write it as ``last.ckpt``."""
    fit(folder, net, strategy, world, ckpt_path=path).save_checkpoint(folder / "last.ckpt", weights_only=False)


def curve(folder: Path, name: str = "train/loss") -> list[float]:
    """Return a column of a run's log."""
    with open(folder / "metrics.csv") as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


def complaint(run: Callable[[], Any]) -> str:
    """Return the message of the error that ``run`` raises."""
    try:
        run()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing raised"


def as_rank(rank: int) -> None:
    """Say in this process what Lightning's launcher does."""
    logging.getLogger("lightning").setLevel(logging.ERROR)
    os.environ.pop("PL_GLOBAL_SEED", None)  # an earlier test's, from which Lightning would seed the ranks again
    os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


DIVISIONS: dict[str, dict[str, Any]] = {
    "experts": {},
    "experts, rest sharded": {"non_experts": "shard"},
    "no experts, rest sharded": {"expert_parallel_size": 1, "fsdp_size": 2, "non_experts": "shard"},
}


def divided(name: str, **options: Any) -> ExpertParallelStrategy:
    return ExpertParallelStrategy(**DIVISIONS[name], **options)


class StandsStill(Callback):
    """The callback answers no other rank from the second batch on, and ends the process once ``end`` exists."""

    def __init__(self, end: Path) -> None:
        self.end = end

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        while batch_idx == 1:
            time.sleep(0.1)
            if self.end.exists():
                os._exit(0)


def lose_a_rank(rank: int, folder: Path) -> None:
    """Train on two ranks, of which rank 1 stands still; rank 0 leaves the message of its error in ``message``."""
    torch.set_num_threads(1)
    as_rank(rank)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", WORLD), rank=rank, world_size=WORLD)
    callbacks = [StandsStill(folder / "message")] if rank == 1 else []
    strategy = divided("experts", timeout=timedelta(seconds=4))
    message = complaint(lambda: fit(folder / "lost", model(), strategy, WORLD, callbacks=callbacks))
    (folder / "unfinished").write_text(message)
    (folder / "unfinished").rename(folder / "message")
    os._exit(0)  # no group is left to be ended in order


class DiesOnce(Callback):
    """The callback kills rank 1 before a step, unless ``done`` exists.

    Args:
        step: optimizer step, from 0.
        done: a file that the kill leaves.
    """

    def __init__(self, step: int, done: str) -> None:
        self.step, self.done = step, Path(done)

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_step == self.step and trainer.global_rank == 1 and not self.done.exists():
            self.done.touch()
            os.kill(os.getpid(), signal.SIGKILL)
