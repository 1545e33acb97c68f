"""A run's folder: whose it is, who may write there, and what a termination leaves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from filelock import FileLock
from places import environment
from tiny_app import CONFIG

from apps.cli import main
from apps.train.checkpoint.run_folder import MARKER, marked_if_new


def test_a_new_folder_is_marked_before_the_first_file_and_goes_if_none_comes(tmp_path):
    def stopped(*files: Path) -> None:
        with pytest.raises(KeyboardInterrupt), marked_if_new(tmp_path / "run"):
            assert (tmp_path / "run" / MARKER).exists()
            for file in files:
                file.touch()
            raise KeyboardInterrupt

    stopped()
    assert not (tmp_path / "run").exists()
    stopped(tmp_path / "run" / "report")
    assert {path.name for path in (tmp_path / "run").iterdir()} == {MARKER, "report"}
    (tmp_path / "run" / MARKER).unlink()
    with marked_if_new(tmp_path / "run"):  # of somebody else
        assert not (tmp_path / "run" / MARKER).exists()


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
    assert Path("run/earlier/2/checkpoints/last.ckpt").is_file()
    assert len(list(Path("run/earlier/2/tensorboard").glob("events*"))) == 1


def run_of(folder):
    """Return a run's files but for those of earlier runs and the marker."""
    return {k: v for k, v in content(folder).items() if not k.startswith("earlier/") and k != MARKER}


def test_no_run_removes_an_earlier_one_but_with_overwrite(config, capsys):
    runs, argv = [], ["fit", "--config", config, "--run_dir", "run"]
    # As an earlier version has left it.
    Path("run/earlier/checkpoints").mkdir(parents=True)
    Path("run/earlier/checkpoints/last.ckpt").write_bytes(b"old")
    Path("run", MARKER).touch()
    for seed in ("1", "2", "3"):
        assert main([*argv, "--seed_everything", seed]) == 0
        runs.append(run_of(Path("run")))
    assert [run_of(Path("run/earlier", number)) for number in ("1", "2")] == runs[:2]
    assert "run held an earlier run: it is in run/earlier/2 now (--ckpt_path run/earlier/2 tests it)" in (
        capsys.readouterr().out
    )
    assert main([*argv, "--overwrite"]) == 0
    removed = "--overwrite has removed the earlier run in run: tensorboard/events"
    assert removed in (printed := capsys.readouterr().out)
    assert "config.yaml, metrics.csv, checkpoints\n" in printed
    assert {p.name for p in Path("run/earlier").iterdir()} == {"1", "2", "checkpoints"}
    assert run_of(Path("run/earlier/2")) == runs[1]
    assert Path("run/earlier/checkpoints/last.ckpt").read_bytes() == b"old"


@pytest.mark.parametrize("left", range(5))
def test_a_kill_while_a_run_is_moved_loses_none_and_splits_none(config, monkeypatch, left):
    argv = ["fit", "--config", config, "--run_dir", "run"]
    assert main(argv) == 0
    before, moves, replace = run_of(Path("run")), iter(range(left)), os.replace

    def killed(source, target):
        if "earlier" in str(target) and next(moves, None) is None:
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        assert main(argv) == 130
    assert main(argv) == 0
    assert run_of(Path("run/earlier/1")) == before
    assert not Path("run/earlier/2").exists()


def test_going_on_from_elsewhere_puts_the_run_in_the_folder_aside(config):
    argv = ["fit", "--config", config, "--run_dir", "run", "--model.average_last", "2"]
    for _ in range(2):
        assert main(argv) == 0
    first, second = run_of(Path("run/earlier/1")), run_of(Path("run"))
    last = "run/earlier/1/checkpoints/last.ckpt"
    assert main([*argv, "--ckpt_path", last, "--trainer.max_epochs", "2"]) == 0
    assert run_of(Path("run/earlier/1")) == first
    assert run_of(Path("run/earlier/2")) == second
    assert Path("run/checkpoints/average.ckpt").is_file()
    assert main([*argv, "--ckpt_path", "last", "--trainer.max_epochs", "3"]) == 0
    assert not Path("run/earlier/3").exists()


def test_a_run_that_logged_and_left_no_checkpoint_is_kept(config):
    argv = ["fit", "--config", config, "--run_dir", "run", "--trainer.enable_checkpointing", "false"]
    assert main(argv) == 0
    before = run_of(Path("run"))
    assert main(argv) == 0
    assert run_of(Path("run/earlier/1")) == before


def test_a_run_that_did_nothing_is_written_over_and_nothing_else(config):
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
    argv = ["fit", "--config", config, "--run_dir", "run"]
    # The lock is that of an open file: one process that opens it twice waits for itself as two processes do.
    with FileLock(Path("run", MARKER)):
        assert main(argv) == 1
    stderr = capsys.readouterr().err
    assert "another training is running in run: wait for its end, or give another --run_dir" in stderr
    assert content(Path("run")).keys() <= {MARKER}
    assert main(argv) == 0


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
    process = subprocess.Popen(
        [sys.executable, "-m", "apps.cli", "fit", "--config", config, "--run_dir", "run"],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    while not Path("validating").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 143, output
    assert output.count("terminated") == 1
    assert "Traceback" not in output
