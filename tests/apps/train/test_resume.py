"""A run that was killed and resumed ends where an unbroken one does: the same weights, the same log, bit by bit."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from places import environment
from resuming import CONFIG, Stop, assert_same, checkpoint, differences, fit, log

from apps.train.resume import generator_state, restore_generators


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "config.yaml"
    path.write_text(CONFIG)
    return str(path)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of an unbroken run of ``CONFIG``, only to be read."""
    folder = tmp_path_factory.mktemp("unbroken")
    (folder / "config.yaml").write_text(CONFIG)
    torch.manual_seed(0)
    fit(str(folder / "config.yaml"), folder / "run")
    return folder / "run"


def test_a_run_stopped_again_and_again_resumes_exactly(config, tmp_path, unbroken):
    # Nothing is saved before batch 1: "last" begins again. From step 4 on, the fifth batch is batch 9.
    for stop in (1, 5, 5):
        with pytest.raises(Stop):
            fit(config, tmp_path / "broken", "--ckpt_path", "last", stop_at=stop)
    fit(config, tmp_path / "broken", "--ckpt_path", "last")
    assert_same(unbroken, tmp_path / "broken")


# Batch 5 lies in mid-epoch and off a saved step, 9 is the first of an epoch, 17 the last of one.
@pytest.mark.parametrize(
    ("stops", "flags"),
    [
        ((17, 3), ("--trainer.accumulate_grad_batches", "2")),
        ((5, 16), ("--trainer.val_check_interval", "4")),
        ((7, 12), ("--trainer.max_epochs", "-1", "--trainer.max_steps", "24", "--trainer.log_every_n_steps", "1")),
        ((13, 4), ("--trainer.limit_train_batches", "6")),
        ((4, 7), ("--data.num_workers", "1", "--model.ema_decay", "null")),
    ],
    ids=["accumulation", "validation_within", "max_steps", "limited", "workers"],
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
    process = subprocess.Popen(
        [*command, "--model.seconds", "0.05"],
        env=environment(OMP_NUM_THREADS=str(torch.get_num_threads())),
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
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


def test_a_killed_process_resumes_exactly(config, tmp_path, unbroken):
    broken = tmp_path / "broken"
    assert fit_and_signal(config, broken, signal.SIGKILL, step=13)[0] == -signal.SIGKILL
    assert 9 < checkpoint(broken)["global_step"] < 27
    # What no one writes comes from the checkpoint: without the flag, the resumed run would be as slow.
    fit(config, broken, "--ckpt_path", str(broken / "checkpoints" / "last.ckpt"), "--model.seconds", "0.0")
    assert_same(unbroken, broken)
    assert not list(broken.rglob("*.tmp"))


def test_a_terminated_process_saves_its_last_step_is_no_success_and_says_how_to_go_on(tmp_path):
    config = tmp_path / "config.yaml"  # without another checkpoint before the first epoch's end, at step 9
    config.write_text(
        CONFIG.replace("every_n_steps: 2}", "every_n_steps: 1000}").replace(
            "log_every_n_steps: 2", "log_every_n_steps: 1"
        )
    )
    fit(str(config), tmp_path / "unbroken")
    code, stderr = fit_and_signal(str(config), tmp_path / "run", signal.SIGTERM, step=3)
    assert code == 143
    step = checkpoint(tmp_path / "run")["global_step"]
    assert 4 <= step < 27
    # The log holds the steps before it, and one row of the model's size at step 0.
    assert {int(row["step"]) for row in log(tmp_path / "run")} == set(range(step))
    last = stderr.strip().splitlines()[-1]
    assert last == "terminated; --ckpt_path last goes on from the last checkpoint, if there is one"
    assert "Traceback" not in stderr
    last = str(tmp_path / "run" / "checkpoints" / "last.ckpt")
    fit(str(config), tmp_path / "run", "--ckpt_path", last, "--model.seconds", "0.0")
    assert_same(tmp_path / "unbroken", tmp_path / "run")


def test_a_finished_run_is_left_as_it_is_and_can_be_made_longer(config, tmp_path):
    fit(config, tmp_path / "run")
    before = checkpoint(tmp_path / "run")
    fit(config, tmp_path / "run", "--ckpt_path", "last")
    assert differences(before, checkpoint(tmp_path / "run")) == []
    fit(config, tmp_path / "run", "--ckpt_path", "last", "--trainer.max_epochs", "4")
    assert checkpoint(tmp_path / "run")["global_step"] == 36


def test_generators_go_on_where_they_were(tmp_path):
    state = generator_state()
    torch.save(state, tmp_path / "state.pt")
    drawn = (random.random(), np.random.rand(3).tolist(), torch.rand(3).tolist())
    restore_generators(torch.load(tmp_path / "state.pt", weights_only=True))
    assert drawn == (random.random(), np.random.rand(3).tolist(), torch.rand(3).tolist())
