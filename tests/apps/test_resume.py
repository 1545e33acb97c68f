"""A run that was killed and resumed ends where an unbroken one does: the same weights, the same log, bit by bit."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from apps.cli.train import build, quiet

ROOT = Path(__file__).parents[2]

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
    - class_path: apps.callbacks.BestAndLast
      init_args: {every_n_steps: 2}
"""


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG)
    return str(path)


class Stop(Exception):
    """As sudden as a kill, but for the process."""


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
    """Where two checkpoints differ."""
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
        return [{k: v for k, v in row.items() if "per_second" not in k} for row in csv.DictReader(file)]


def assert_same(unbroken: Path, resumed: Path) -> None:
    for name in ("last", "best"):
        assert differences(checkpoint(unbroken, name), checkpoint(resumed, name)) == []
    assert log(unbroken) == log(resumed)


# Batch 5 lies in mid-epoch and off a saved step, 9 is the first of an epoch, 17 the last of one.
@pytest.mark.parametrize(
    ("stops", "flags"),
    [
        ((5,), ()),
        ((1, 9, 8), ()),  # nothing is saved before batch 1: "last" begins again
        ((17, 3), ("--trainer.accumulate_grad_batches", "2")),
        ((5, 16), ("--trainer.val_check_interval", "4")),
        ((7, 12), ("--trainer.max_epochs", "-1", "--trainer.max_steps", "24", "--trainer.log_every_n_steps", "1")),
        ((13, 4), ("--trainer.limit_train_batches", "6")),
        ((4, 7), ("--data.num_workers", "1", "--model.ema_decay", "null")),
    ],
    ids=["mid_epoch", "again_and_again", "accumulation", "validation_within", "max_steps", "limited", "workers"],
)
def test_a_stopped_run_resumes_exactly(config, tmp_path, stops, flags):
    fit(config, tmp_path / "unbroken", *flags)
    for stop in stops:
        with pytest.raises(Stop):
            fit(config, tmp_path / "broken", *flags, "--ckpt_path", "last", stop_at=stop)
    fit(config, tmp_path / "broken", *flags, "--ckpt_path", "last")
    assert_same(tmp_path / "unbroken", tmp_path / "broken")


def fit_and_signal(config: str, run_dir: Path, number: signal.Signals, step: int) -> tuple[int, str]:
    """A process that trains and is sent a signal once ``step`` is in its log: how it ended, and its stderr."""
    command = [sys.executable, "-m", "apps.cli", "fit", "--config", config, "--run_dir", str(run_dir)]
    path = os.pathsep.join((str(ROOT), str(Path(__file__).parent)))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(
        [*command, "--model.seconds", "0.05"],
        env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while not (run_dir / "metrics.csv").exists() or not any(int(r["step"]) >= step for r in log(run_dir)):
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.send_signal(number)
        return process.wait(60), process.stderr.read()
    finally:
        process.kill()
        process.communicate()


def test_a_killed_process_resumes_exactly(config, tmp_path):
    fit(config, tmp_path / "unbroken")
    broken = tmp_path / "broken"
    assert fit_and_signal(config, broken, signal.SIGKILL, step=13)[0] == -signal.SIGKILL
    assert 9 < checkpoint(broken)["global_step"] < 27
    # What no one writes comes from the checkpoint: without the flag, the resumed run would be as slow.
    fit(config, broken, "--ckpt_path", str(broken / "checkpoints" / "last.ckpt"), "--model.seconds", "0.0")
    assert_same(tmp_path / "unbroken", broken)
    assert not list(broken.rglob("*.tmp"))


def test_a_terminated_process_is_no_success_and_says_how_to_go_on(config, tmp_path):
    fit(config, tmp_path / "unbroken")
    code, told = fit_and_signal(config, tmp_path / "run", signal.SIGTERM, step=3)
    assert code == 143
    assert checkpoint(tmp_path / "run")["global_step"] >= 4  # it is written after the step that runs
    last = told.strip().splitlines()[-1]
    assert last == "terminated; --ckpt_path last goes on from the last checkpoint, if there is one"
    assert "Traceback" not in told
    last = str(tmp_path / "run" / "checkpoints" / "last.ckpt")
    fit(config, tmp_path / "run", "--ckpt_path", last, "--model.seconds", "0.0")
    assert_same(tmp_path / "unbroken", tmp_path / "run")


def test_a_finished_run_is_left_as_it_is_and_can_be_made_longer(config, tmp_path):
    fit(config, tmp_path / "run")
    before = checkpoint(tmp_path / "run")
    fit(config, tmp_path / "run", "--ckpt_path", "last")
    assert differences(before, checkpoint(tmp_path / "run")) == []
    fit(config, tmp_path / "run", "--ckpt_path", "last", "--trainer.max_epochs", "4")
    assert checkpoint(tmp_path / "run")["global_step"] == 36
