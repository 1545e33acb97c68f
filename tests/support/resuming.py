"""A run that is stopped and resumed beside an unbroken one, and where their checkpoints and logs differ."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import torch

from apps.cli.train import build, quiet

# All that has a state: dropout and routing noise (generators), an expert bias, an average, a loader in mid-epoch with
# random transforms, warm-up and decay. 66 points in batches of 8: 9 steps an epoch, the last one of 2 points.
CONFIG = """
model:
  class_path: tiny_app.TinyModule
  init_args:
    moe:
      num_experts: 4
      router:
        class_path: TokenChoice
        init_args: {top_k: 2, noise: fixed, score_func: sigmoid, expert_bias: true}
      expert: {class_path: FFN, init_args: {hidden_dim: 8}}
      capacity_factor: 1.0
      priority: random
    optimizer: {lr: 0.01}
    ema_decay: 0.99
data:
  class_path: tiny_app.TinyData
trainer:
  accelerator: cpu
  max_epochs: 3
  gradient_clip_val: 1.0
  log_every_n_steps: 2
  callbacks:
    - class_path: apps.train.checkpoint.checkpoints.BestAndLast
      init_args: {every_n_steps: 2}
"""


class Stop(Exception):
    """This error stops a training as suddenly as a kill would, and leaves the process alive."""


def fit(config: str, run_dir: Path, *flags: str, stop_at: int | None = None) -> None:
    """Train in this process, up to the start of batch ``stop_at`` counted from the run's first."""
    with quiet():
        cli = build("fit", ["--config", config, "--run_dir", str(run_dir), *flags])
        if stop_at is not None:
            batches = iter(range(stop_at))
            original = cli.model.task_loss

            def task_loss(batch: Any) -> Any:
                if cli.model.training and next(batches, None) is None:
                    raise Stop
                return original(batch)

            cli.model.task_loss = task_loss
        cli.execute()


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    """Return the paths at which two checkpoints differ."""
    if isinstance(a, torch.Tensor):
        return [] if torch.equal(a, b) else [path]
    if isinstance(a, dict):
        if set(a) != set(b):
            return [path]
        return [d for k in a for d in differences(a[k], b[k], f"{path}/{k}")]
    if isinstance(a, (list, tuple)):
        if len(a) != len(b):
            return [path]
        return [d for i, (x, y) in enumerate(zip(a, b, strict=True)) for d in differences(x, y, f"{path}/{i}")]
    return [] if a == b else [path]


def checkpoint(run_dir: Path, name: str = "last") -> dict[str, Any]:
    saved = torch.load(run_dir / "checkpoints" / f"{name}.ckpt", weights_only=True)
    del saved["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]  # not counted from the run's start on resuming
    return saved


def log(run_dir: Path) -> list[dict[str, str]]:
    with open(run_dir / "metrics.csv") as file:
        measured = ("train/examples_per_second", "train/peak_memory_mib")
        return [{k: v for k, v in row.items() if k not in measured} for row in csv.DictReader(file)]


def assert_same(unbroken: Path, resumed: Path) -> None:
    for name in ("last", "best"):
        assert differences(checkpoint(unbroken, name), checkpoint(resumed, name)) == []
    assert log(unbroken) == log(resumed)
