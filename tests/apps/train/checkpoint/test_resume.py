"""A run that was killed and resumed ends where an unbroken one does: the same weights, the same log, bit by bit."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from places import environment
from resuming import CONFIG, Stop, assert_same, checkpoint, differences, fit, log

from apps.base.quiet import quiet
from apps.cli.errors import stopped
from apps.cli.train import build
from apps.train.checkpoint.resume import generator_state, restore_generators


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
        pytest.param((17, 3), ("--trainer.accumulate_grad_batches", "2"), marks=pytest.mark.slow),
        ((5, 16), ("--trainer.val_check_interval", "4")),
        ((7, 12), ("--trainer.max_epochs", "-1", "--trainer.max_steps", "24", "--trainer.log_every_n_steps", "1")),
        ((13, 4), ("--trainer.limit_train_batches", "6")),
        pytest.param((4, 7), ("--data.num_workers", "1", "--model.ema_decay", "null"), marks=pytest.mark.slow),
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


OF_THE_USER = """    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args: {monitor: val/loss, save_top_k: 2, save_last: true, filename: "{epoch}"}
"""


def test_a_run_with_a_model_checkpoint_of_the_user_s_resumes_exactly(config, tmp_path, unbroken):
    Path(config).write_text(CONFIG + OF_THE_USER)
    fit(config, tmp_path / "whole")
    for stop in (5, 12):
        with pytest.raises(Stop):
            fit(config, tmp_path / "broken", "--ckpt_path", "last", stop_at=stop)
    fit(config, tmp_path / "broken", "--ckpt_path", "last")
    kept, saved = {}, {}
    for name in ("whole", "broken"):
        saved[name] = checkpoint(tmp_path / name)
        state = next(saved[name]["callbacks"].pop(k) for k in list(saved[name]["callbacks"]) if "ModelCheck" in k)
        kept[name] = {Path(k).name: float(v) for k, v in state["best_k_models"].items()}
    assert differences(saved["whole"], saved["broken"]) == []
    assert log(tmp_path / "whole") == log(tmp_path / "broken") == log(unbroken)
    assert len(kept["whole"]) == 2
    assert kept["whole"] == kept["broken"]
    for name in (*kept["whole"], "last.ckpt"):
        one, other = (torch.load(tmp_path / run / "ModelCheckpoint" / name) for run in ("whole", "broken"))
        assert differences(one["state_dict"], other["state_dict"]) == []
    assert {p.name for p in (tmp_path / "broken" / "ModelCheckpoint").iterdir()} == {*kept["whole"], "last.ckpt"}
    assert {p.name for p in (tmp_path / "broken" / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}


def fit_and_signal(config: str, run_dir: Path, number: signal.Signals, step: int) -> tuple[int, str]:
    """A process that trains and is sent a signal once ``step`` is in its log: how it ended, and its stderr."""
    command = [sys.executable, "-m", "apps.cli", "fit", "--config", config, "--run_dir", str(run_dir)]
    process = subprocess.Popen(
        [*command, "--model.seconds", "0.05"],
        env=environment(OMP_NUM_THREADS=str(torch.get_num_threads())),
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores it
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


@pytest.mark.parametrize(
    ("number", "ending", "how"),
    [
        (signal.SIGTERM, 143, "terminated"),
        pytest.param(signal.SIGINT, 130, "interrupted", marks=pytest.mark.slow),
    ],
)
def test_a_stopped_process_saves_its_last_step_is_no_success_and_says_how_to_go_on(tmp_path, number, ending, how):
    config = tmp_path / "config.yaml"  # without another checkpoint before the first epoch's end, at step 9
    config.write_text(
        CONFIG.replace("every_n_steps: 2}", "every_n_steps: 1000}").replace(
            "log_every_n_steps: 2", "log_every_n_steps: 1"
        )
    )
    fit(str(config), tmp_path / "unbroken")
    code, stderr = fit_and_signal(str(config), tmp_path / "run", number, step=3)
    assert code == ending
    step = checkpoint(tmp_path / "run")["global_step"]
    assert 4 <= step < 27
    # The log holds the steps before it, and one row of the model's size at step 0.
    assert {int(row["step"]) for row in log(tmp_path / "run")} == set(range(step))
    last = stderr.strip().splitlines()[-1]
    assert last == f"{how}; --ckpt_path last continues from the last checkpoint, if there is one"
    assert "Traceback" not in stderr
    last = str(tmp_path / "run" / "checkpoints" / "last.ckpt")
    fit(str(config), tmp_path / "run", "--ckpt_path", last, "--model.seconds", "0.0")
    assert_same(tmp_path / "unbroken", tmp_path / "run")


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Ctrl-C is heeded, as it is not in a job in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def fit_and_signal_at(config: str, run_dir: Path, *flags: str, numbers: list[int], validates: bool, batch: int) -> None:
    """Train in this process, which sends itself signals in a batch of the training or validation, from 0."""
    with quiet():
        cli = build("fit", ["--config", config, "--run_dir", str(run_dir), *flags])
        batches, original = iter(range(batch + 1)), cli.model.task_loss

        def task_loss(data: Any) -> Any:
            if cli.model.training != validates and not cli.trainer.sanity_checking and next(batches, None) == batch:
                for number in numbers:
                    os.kill(os.getpid(), number)
            return original(data)

        cli.model.task_loss = task_loss
        with pytest.raises((KeyboardInterrupt, SystemExit)) as stop:
            cli.execute()
    assert stopped(stop.value, "") == (130 if numbers[-1] == signal.SIGINT else 143)


# An epoch has 9 batches of training and 3 of validation.
@pytest.mark.parametrize(
    ("number", "validates", "batches", "step", "flags"),
    [
        (signal.SIGTERM, True, (4, 1), 18, ()),
        pytest.param(
            signal.SIGINT,
            True,
            (0, 0),
            9,
            ("--model.ema_decay", "null", "--data.num_workers", "1"),
            marks=pytest.mark.slow,
        ),
        pytest.param(signal.SIGTERM, True, (4,), 8, ("--trainer.val_check_interval", "4"), marks=pytest.mark.slow),
        (signal.SIGINT, True, (8,), 27, ("--trainer.max_epochs", "-1", "--trainer.max_steps", "27")),
        (signal.SIGTERM, False, (8,), 9, ()),
        (signal.SIGINT, False, (3,), 4, ()),
    ],
)
def test_a_run_that_a_signal_stops_resumes_exactly(ctrl_c, tmp_path, number, validates, batches, step, flags):
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG.replace("every_n_steps: 2}", "every_n_steps: 1000}"))
    fit(str(config), tmp_path / "unbroken", *flags)
    for batch in batches:
        where = {"numbers": [number], "validates": validates, "batch": batch}
        fit_and_signal_at(str(config), tmp_path / "run", *flags, "--ckpt_path", "last", **where)
        assert checkpoint(tmp_path / "run")["global_step"] == step
    fit(str(config), tmp_path / "run", *flags, "--ckpt_path", "last")
    assert_same(tmp_path / "unbroken", tmp_path / "run")


@pytest.mark.parametrize("numbers", [[signal.SIGINT, signal.SIGINT], [signal.SIGINT, signal.SIGTERM]])
def test_a_second_signal_does_not_wait(ctrl_c, config, tmp_path, numbers):
    fit_and_signal_at(config, tmp_path / "run", numbers=numbers, validates=False, batch=0)
    assert not (tmp_path / "run" / "checkpoints").exists()


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
