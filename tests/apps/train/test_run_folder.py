"""A run's folder: whose it is, who may write there, and what a termination leaves."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from places import environment

from apps.cli import main
from apps.train.run_folder import MARKER

CONFIG = """
model: {class_path: tiny_app.TinyModule, init_args: {dropout: 0.0}}
data: {class_path: tiny_app.TinyData, init_args: {n: 24}}
trainer: {accelerator: cpu, max_epochs: 1, log_every_n_steps: 1, enable_progress_bar: false}
"""


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(CONFIG)
    return "tiny.yaml"


def content(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("name", ["notes.txt", "config.yaml", "tensorboard/events.out.tfevents.1.mine", "x/y/z.bin"])
def test_a_folder_that_no_run_has_made_stays_as_it_is(config, capsys, name):
    path = Path("logs", name)
    path.parent.mkdir(parents=True)
    path.write_text("of someone else")
    assert main(["fit", "--config", config, "--run_dir", "logs"]) == 1
    assert f"logs holds {Path(name).parts[0]}, and no run has made the folder" in capsys.readouterr().err
    assert content(Path("logs")) == {name: b"of someone else"}


def test_files_of_others_in_a_runs_folder_stay_there(config, capsys):
    assert main(["fit", "--config", config, "--run_dir", "run"]) == 0
    foreign = ["notes.txt", "tensorboard/sketch.png", "earlier/keep.txt", "earlier/tensorboard/keep.txt"]
    for name in foreign:
        Path("run", name).parent.mkdir(exist_ok=True, parents=True)
        Path("run", name).write_text(name)
    for _ in range(2):  # the second time, earlier holds a run
        assert main(["fit", "--config", config, "--run_dir", "run"]) == 0
        assert [Path("run", name).read_text() for name in foreign] == foreign
    assert Path("run/earlier/checkpoints/last.ckpt").is_file()
    assert len(list(Path("run/earlier/tensorboard").glob("events*"))) == 1


def test_a_run_without_a_checkpoint_is_written_over_and_nothing_else(config):
    Path("run/tensorboard/mine").mkdir(parents=True)
    Path("run", MARKER).touch()
    Path("run/tensorboard/mine/data").write_text("x")
    Path("run/tensorboard/events.out.tfevents.0").write_text("of a run that was killed at its start")
    assert main(["fit", "--config", config, "--run_dir", "run"]) == 0
    assert Path("run/tensorboard/mine/data").read_text() == "x"
    assert not Path("run/tensorboard/events.out.tfevents.0").exists()


def test_a_test_replaces_no_file_that_no_run_has_written(config, capsys):
    assert main(["fit", "--config", config, "--run_dir", "run"]) == 0
    Path("other").mkdir()
    Path("other/test.json").write_text("mine")
    argv = ["test", "--config", config, "--ckpt_path", "run/checkpoints/best.ckpt", "--run_dir"]
    assert main([*argv, "other"]) == 1
    assert "other/test.json is no run's" in capsys.readouterr().err
    assert Path("other/test.json").read_text() == "mine"
    assert main([*argv, "new"]) == 0  # and a training may follow in a folder that a test has made
    assert main(["fit", "--config", config, "--run_dir", "new"]) == 0


def test_a_second_training_in_a_folder_is_refused(config, capsys):
    Path("run").mkdir()
    with FileLock(Path("run", MARKER)):
        code = subprocess.run(
            [sys.executable, "-m", "apps.cli", "fit", "--config", config, "--run_dir", "run"],
            env=environment(),
            capture_output=True,
            text=True,
        )
    assert code.returncode == 1
    assert "another training is running in run: wait for its end, or give another --run_dir" in code.stderr
    assert content(Path("run")).keys() <= {MARKER}
    assert main(["fit", "--config", config, "--run_dir", "run"]) == 0


def test_a_run_that_ends_before_its_training_leaves_no_folder(config):
    assert main(["fit", "--config", config, "--run_dir", "run", "--trainer.limit_train_batches", "0.001"]) != 0
    assert not Path("run").exists()


def test_resuming_says_where_it_goes_on(config, capsys):
    assert main(["fit", "--config", config, "--run_dir", "run"]) == 0
    capsys.readouterr()
    argv = ["fit", "--config", config, "--run_dir", "run", "--ckpt_path", "last", "--trainer.max_epochs", "2"]
    assert main(argv) == 0
    # 24 examples in batches of 8: three steps an epoch.
    printed = capsys.readouterr().out
    assert "going on from run/checkpoints/last.ckpt: step 3, epoch 2" in printed
    assert "trained 2 epochs, 6 steps (3 of them now), in" in printed


def terminated(config, *flags, when):
    """Start a training, send SIGTERM as soon as ``when()`` holds, and return its exit code and what it printed."""
    process = subprocess.Popen(
        [sys.executable, "-m", "apps.cli", "fit", "--config", config, "--run_dir", "run", *flags],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not when():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    return process.returncode, out + err


def rows():
    path = Path("run/metrics.csv")
    return len(path.read_text().splitlines()) - 1 if path.exists() else 0


def test_a_terminated_training_writes_what_it_has_reached(config):
    # An epoch of 1,000 steps of 50 ms, of which no other checkpoint is written within ten minutes.
    code, _ = terminated(config, "--data.n", "8000", "--model.seconds", "0.05", when=lambda: rows() >= 5)
    assert code == 143
    step = torch.load("run/checkpoints/last.ckpt", weights_only=True)["global_step"]
    assert 5 <= step < 1000
    # The log holds the steps before it, and one row of the model's size at step 0.
    logged = {int(line.split(",")[0]) for line in Path("run/metrics.csv").read_text().splitlines()[1:]}
    assert logged == set(range(step))


def test_a_termination_in_the_validation_does_not_wait_for_its_batch(config):
    text = Path(config).read_text().replace("tiny_app.TinyModule", "slow_validation.SlowValidation")
    Path(config).write_text(text)
    Path("slow_validation.py").write_text(
        "import time\nfrom pathlib import Path\nfrom tiny_app import TinyModule\n"
        "class SlowValidation(TinyModule):\n"
        "    def validation_step(self, batch, batch_idx):\n"
        "        if not self.trainer.sanity_checking:\n"
        "            Path('validating').touch()\n"
        "            for _ in range(6000):\n"
        "                time.sleep(0.01)\n"  # a minute, after which this test's patience would be over
    )
    code, printed = terminated(config, when=Path("validating").exists)
    assert code == 143, printed
    assert "terminated" in printed
    assert "Traceback" not in printed
    assert json.dumps(printed).count("terminated") == 1
