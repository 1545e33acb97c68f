"""A run that was killed and resumed ends where an unbroken one does: the same weights, the same log, bit by bit."""

from __future__ import annotations

import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from resuming import CONFIG, Stop, assert_same, checkpoint, differences, fit, log

from apps.base.quiet import quiet
from apps.cli import main
from apps.cli.errors import stopped
from apps.cli.train import build
from apps.train.checkpoint.resume import generator_state, restore_generators

RARELY = CONFIG.replace("every_n_steps: 2}", "every_n_steps: 1000}")
"""No checkpoint comes before the first epoch's end, at step 9, but where the run is stopped."""


def written(folder: Path, text: str) -> str:
    (folder / "config.yaml").write_text(text)
    return str(folder / "config.yaml")


@pytest.fixture
def config(tmp_path: Path) -> str:
    return written(tmp_path, CONFIG)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of an unbroken run of ``CONFIG``, only to be read."""
    folder = tmp_path_factory.mktemp("unbroken")
    fit(written(folder, CONFIG), folder / "run")
    return folder / "run"


def resume_after(stops: tuple[int, ...], config: str, run_dir: Path, *flags: str) -> None:
    for stop in stops:
        with pytest.raises(Stop):
            fit(config, run_dir, *flags, "--ckpt_path", "last", stop_at=stop)
    fit(config, run_dir, *flags, "--ckpt_path", "last")


WITHIN = ("--trainer.val_check_interval", "3", "--trainer.limit_train_batches", "6", "--trainer.max_epochs", "2")


# Batch 4 lies in mid-epoch and off a saved step, 17 is the last of an epoch.
@pytest.mark.parametrize(
    ("stops", "flags"),
    [
        ((4, 6), WITHIN),
        pytest.param(
            (16,),
            ("--trainer.max_epochs", "-1", "--trainer.max_steps", "20", "--trainer.log_every_n_steps", "1"),
            marks=pytest.mark.slow,
        ),
        pytest.param((17, 3), ("--trainer.accumulate_grad_batches", "2"), marks=pytest.mark.slow),
        pytest.param((4, 7), ("--data.num_workers", "1", "--model.ema_decay", "null"), marks=pytest.mark.slow),
    ],
    ids=["limited_and_validated_within", "max_steps", "accumulation", "workers"],
)
def test_a_stopped_run_resumes_exactly(config, tmp_path, stops, flags):
    fit(config, tmp_path / "unbroken", *flags)
    resume_after(stops, config, tmp_path / "broken", *flags)
    assert_same(tmp_path / "unbroken", tmp_path / "broken")


OF_THE_USER = """    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args: {monitor: val/loss, save_top_k: 2, save_last: true, filename: "{epoch}"}
"""


@pytest.mark.slow
def test_a_run_with_a_model_checkpoint_of_the_user_s_resumes_exactly_again_and_again(tmp_path, unbroken):
    config = written(tmp_path, CONFIG + OF_THE_USER)
    fit(config, tmp_path / "whole")
    # Nothing is saved before batch 1: "last" begins again. From step 4 on, the fifth batch is batch 9.
    resume_after((1, 5, 5), config, tmp_path / "broken")
    kept, saved = {}, {}
    for name in ("whole", "broken"):
        saved[name] = checkpoint(tmp_path / name)
        state = next(saved[name]["callbacks"].pop(k) for k in list(saved[name]["callbacks"]) if "ModelCheck" in k)
        kept[name] = {Path(k).name: float(v) for k, v in state["best_k_models"].items()}
    assert differences(saved["whole"], saved["broken"]) == []
    assert (
        differences(checkpoint(tmp_path / "whole", "best")["state_dict"], checkpoint(unbroken, "best")["state_dict"])
        == []
    )
    assert log(tmp_path / "whole") == log(tmp_path / "broken") == log(unbroken)
    assert len(kept["whole"]) == 2
    assert kept["whole"] == kept["broken"]
    for name in (*kept["whole"], "last.ckpt"):
        one, other = (torch.load(tmp_path / run / "ModelCheckpoint" / name) for run in ("whole", "broken"))
        assert differences(one["state_dict"], other["state_dict"]) == []
    assert {p.name for p in (tmp_path / "broken" / "ModelCheckpoint").iterdir()} == {*kept["whole"], "last.ckpt"}
    assert {p.name for p in (tmp_path / "broken" / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}


def as_process(argv: list[str], errors: Path) -> None:
    """Run a command as a process of its own, whose stderr is a file."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
    sys.exit(main(argv))


def fit_and_signal(config: str, run_dir: Path, number: signal.Signals, step: int) -> tuple[int, str]:
    """A process that trains and is sent a signal once ``step`` is in its log: how it ended, and its stderr."""
    multiprocessing.set_forkserver_preload(["apps.cli.train"])
    argv, errors = ["fit", "--config", config, "--model.seconds", "0.05"], run_dir.with_name("errors")
    arguments = ([*argv, "--run_dir", str(run_dir)], errors)
    process = multiprocessing.get_context("forkserver").Process(target=as_process, args=arguments)
    process.start()
    try:
        deadline = time.monotonic() + 120
        while not (run_dir / "metrics.csv").exists() or not any(int(r["step"]) >= step for r in log(run_dir)):
            assert process.is_alive(), errors.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.kill(process.pid, number)
        process.join(60)
        return process.exitcode, errors.read_text()
    finally:
        process.kill()
        process.join()


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
    [(signal.SIGTERM, 143, "terminated"), pytest.param(signal.SIGINT, 130, "interrupted", marks=pytest.mark.slow)],
)
def test_a_stopped_process_saves_its_last_step_is_no_success_and_says_how_to_go_on(
    tmp_path, unbroken, number, ending, how
):
    config, run = written(tmp_path, RARELY), tmp_path / "run"
    code, stderr = fit_and_signal(config, run, number, step=3)
    assert code == ending
    step = checkpoint(run)["global_step"]
    assert 4 <= step < 27
    # The log holds every second step before it, and one row of the model's size at step 0.
    assert {int(row["step"]) for row in log(run)} == {0, *range(1, step, 2)}
    last = stderr.strip().splitlines()[-1]
    assert last == f"{how}; --ckpt_path last continues from the last checkpoint, if there is one"
    assert "Traceback" not in stderr
    fit(config, run, "--ckpt_path", str(run / "checkpoints" / "last.ckpt"), "--model.seconds", "0.0")
    assert_same(unbroken, run)


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


# An epoch has 9 batches of training and 3 of validation. A signal, whether it comes in a validation, in which batch
# since the last stop, and the step that is saved.
STOPS = [
    (signal.SIGINT, False, 3, 4),
    (signal.SIGTERM, False, 4, 9),
    (signal.SIGTERM, True, 4, 18),
    (signal.SIGTERM, True, 1, 18),
    (signal.SIGINT, True, 5, 27),
]
VALIDATED = ("--trainer.val_check_interval", "4")
UNENDING = ("--trainer.max_epochs", "-1", "--trainer.max_steps", "27")
WORKERS = ("--model.ema_decay", "null", "--data.num_workers", "1")


@pytest.mark.parametrize(
    ("stops", "flags"),
    [
        (STOPS, ()),
        pytest.param([(signal.SIGTERM, True, 4, 8)], VALIDATED, marks=pytest.mark.slow),
        pytest.param([(signal.SIGINT, True, 0, 9)] * 2, WORKERS, marks=pytest.mark.slow),
        pytest.param([(signal.SIGINT, True, 8, 27)], UNENDING, marks=pytest.mark.slow),
    ],
    ids=["everywhere", "validated_within", "workers", "max_steps"],
)
def test_a_run_that_a_signal_stops_resumes_exactly(ctrl_c, tmp_path, unbroken, stops, flags):
    config = written(tmp_path, RARELY)
    if flags:
        fit(config, unbroken := tmp_path / "unbroken", *flags)
    for number, validates, batch, step in stops:
        where = {"numbers": [number], "validates": validates, "batch": batch}
        fit_and_signal_at(config, tmp_path / "run", *flags, "--ckpt_path", "last", **where)
        assert checkpoint(tmp_path / "run")["global_step"] == step
    fit(config, tmp_path / "run", *flags, "--ckpt_path", "last")
    assert_same(unbroken, tmp_path / "run")


@pytest.mark.parametrize("numbers", [[signal.SIGINT, signal.SIGINT], [signal.SIGINT, signal.SIGTERM]])
def test_a_second_signal_does_not_wait(ctrl_c, config, tmp_path, numbers):
    fit_and_signal_at(config, tmp_path / "run", numbers=numbers, validates=False, batch=0)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_finished_run_is_left_as_it_is_and_can_be_made_longer(config, tmp_path, unbroken):
    shutil.copytree(unbroken, tmp_path / "run")
    fit(config, tmp_path / "run", "--ckpt_path", "last")
    assert differences(checkpoint(unbroken), checkpoint(tmp_path / "run")) == []
    fit(config, tmp_path / "run", "--ckpt_path", "last", "--trainer.max_epochs", "4")
    assert checkpoint(tmp_path / "run")["global_step"] == 36


def test_generators_go_on_where_they_were(tmp_path):
    state = generator_state()
    torch.save(state, tmp_path / "state.pt")
    drawn = (random.random(), np.random.rand(3).tolist(), torch.rand(3).tolist())
    restore_generators(torch.load(tmp_path / "state.pt", weights_only=True))
    assert drawn == (random.random(), np.random.rand(3).tolist(), torch.rand(3).tolist())
