"""A run's folder: whose it is, who may write there, and what a termination leaves."""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from filelock import FileLock
from tiny_app import CONFIG, TinyModule
from tiny_runs import copy_run

from apps.cli import main
from apps.train.checkpoint.run_folder import MARKER, RunFolder, check_free, marked_if_new

RUN = Path("run")


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


def run_of(folder):
    """Return a run's files but for those of earlier runs and the marker."""
    return {k: v for k, v in content(folder).items() if not k.startswith("earlier/") and k != MARKER}


def write(files):
    for name, text in files.items():
        (RUN / name).parent.mkdir(parents=True, exist_ok=True)
        (RUN / name).write_text(text)


def write_run(number=0):
    """Write by hand what a training leaves, and return it."""
    events = f"tensorboard/events.out.tfevents.{number}"
    names = (MARKER, "config.yaml", "report/load.png", "ModelCheckpoint/0.ckpt", "checkpoints/last.ckpt", events)
    write({name: str(number) for name in names} | {"metrics.csv": "step,loss\n0,1.0\n1,0.5\n"})
    return run_of(RUN)


def begin(overwrite=False, ckpt_path=None):
    """Do with the folder what a training does at its start."""
    own = RunFolder(RUN, {"config.yaml": "of a new run"}, overwrite)
    trainer = SimpleNamespace(is_global_zero=True, ckpt_path=ckpt_path, global_step=0, current_epoch=0)
    with own.held():
        own.on_fit_start(trainer, None)
        own.on_train_start(trainer, None)


@pytest.mark.parametrize("name", ["notes.txt", "config.yaml", "tensorboard/events.out.tfevents.1.mine", "x/y/z.bin"])
def test_a_folder_that_no_run_has_made_stays_as_it_is(config, capsys, name):
    write({name: "of someone else"})
    assert main(["fit", "--config", config, "--run_dir", "run"]) == 1
    assert f"run holds {Path(name).parts[0]}, and no run has made the folder" in capsys.readouterr().err
    assert content(RUN) == {name: b"of someone else"}


def test_files_of_others_in_a_runs_folder_stay_there(config):
    foreign = ["notes.txt", "tensorboard/sketch.png", "earlier/keep.txt", "earlier/tensorboard/keep.txt"]
    write({name: name for name in foreign})
    for number in range(2):  # the second time, earlier holds a run
        write_run(number)
        begin()
        assert [Path(RUN, name).read_text() for name in foreign] == foreign
    assert Path("run/earlier/2/checkpoints/last.ckpt").is_file()
    assert len(list(Path("run/earlier/2/tensorboard").glob("events*"))) == 1


def test_no_run_removes_an_earlier_one_but_with_overwrite(config, capsys):
    write({"earlier/checkpoints/last.ckpt": "old"})  # as an earlier version has left it
    runs = []
    for number in range(3):
        runs.append(write_run(number))
        if number < 2:
            begin()
    assert [run_of(Path("run/earlier", number)) for number in ("1", "2")] == runs[:2]
    assert "run held an earlier run: it is in run/earlier/2 now (--ckpt_path run/earlier/2 tests it)" in (
        capsys.readouterr().out
    )
    begin(overwrite=True)
    names = "tensorboard/events.out.tfevents.2, config.yaml, report, metrics.csv, ModelCheckpoint, checkpoints"
    assert capsys.readouterr().out == f"--overwrite has removed the earlier run in run: {names}\n"
    assert run_of(RUN) == {"config.yaml": b"of a new run"}
    assert {p.name for p in Path("run/earlier").iterdir()} == {"1", "2", "checkpoints"}
    assert run_of(Path("run/earlier/2")) == runs[1]
    assert Path("run/earlier/checkpoints/last.ckpt").read_bytes() == b"old"


@pytest.mark.parametrize("left", range(6))
def test_a_kill_while_a_run_is_moved_loses_none_and_splits_none(config, monkeypatch, left):
    before, moves, replace = write_run(), iter(range(left)), os.replace

    def killed(source, target):
        if "earlier" in str(target) and next(moves, None) is None:
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", killed)
        begin()
    begin()
    assert run_of(Path("run/earlier/1")) == before
    assert not Path("run/earlier/2").exists()


def test_going_on_from_elsewhere_puts_the_run_in_the_folder_aside(config):
    argv = ["fit", "--config", config, "--run_dir", "run", "--model.average_last", "2"]
    assert main(argv) == 0
    shutil.copytree(RUN, "run/earlier/1")
    first, second = run_of(Path("run/earlier/1")), run_of(RUN)
    last = "run/earlier/1/checkpoints/last.ckpt"
    assert main([*argv, "--ckpt_path", last, "--trainer.max_epochs", "2"]) == 0
    assert run_of(Path("run/earlier/1")) == first
    assert run_of(Path("run/earlier/2")) == second
    assert Path("run/checkpoints/average.ckpt").is_file()
    assert Path("run/checkpoints/epochs/0.pt").is_file()  # brought along before the training
    begin(ckpt_path="run/checkpoints/last.ckpt")
    assert not Path("run/earlier/3").exists()


def test_a_run_that_logged_a_step_is_kept_and_one_that_did_nothing_is_written_over(config):
    write({MARKER: "", "tensorboard/mine/data": "x", "tensorboard/events.out.tfevents.0": "of a run that was killed"})
    write({"metrics.csv": "step,size\n0,9\n"})  # the model's size alone
    begin()
    assert Path("run/tensorboard/mine/data").read_text() == "x"
    assert not Path("run/tensorboard/events.out.tfevents.0").exists()
    assert not Path("run/earlier").exists()
    write_run()
    for name in ("checkpoints", "ModelCheckpoint"):
        shutil.rmtree(RUN / name)
    before = {name: text for name, text in run_of(RUN).items() if "mine" not in name}
    begin()
    assert run_of(Path("run/earlier/1")) == before


def test_a_test_replaces_no_file_that_no_run_has_written(config, tmp_path_factory, tmp_path, capsys):
    copy_run(tmp_path_factory, tmp_path)
    Path("other").mkdir()
    Path("other/test.json").write_text("mine")
    argv = ["test", "--config", config, "--ckpt_path", "run/checkpoints/best.ckpt", "--run_dir"]
    assert main([*argv, "other"]) == 1
    assert "other/test.json is no run's" in capsys.readouterr().err
    assert Path("other/test.json").read_text() == "mine"
    assert main([*argv, "new"]) == 0  # and a training may follow in a folder that a test has made
    check_free(Path("new"))


def test_a_second_training_in_a_folder_is_refused(config, capsys):
    RUN.mkdir()
    # The lock is that of an open file: one process that opens it twice waits for itself as two processes do.
    with FileLock(Path("run", MARKER)):
        assert main(["fit", "--config", config, "--run_dir", "run"]) == 1
    stderr = capsys.readouterr().err
    assert "another training is running in run: wait for its end, or give another --run_dir" in stderr
    assert content(RUN).keys() <= {MARKER}
    begin()


def test_a_run_that_ends_before_its_training_leaves_no_folder(config):
    assert main(["fit", "--config", config, "--run_dir", "run", "--trainer.limit_train_batches", "0.001"]) != 0
    assert not RUN.exists()


def test_a_termination_in_the_validation_does_not_wait_for_its_batch(config, monkeypatch, capsys):
    def validation_step(self, batch, batch_idx):
        if not self.trainer.sanity_checking:
            os.kill(os.getpid(), signal.SIGTERM)
            for _ in range(1000):  # ten seconds, in which the signal comes
                time.sleep(0.01)
            pytest.fail("it waits")

    monkeypatch.setattr(TinyModule, "validation_step", validation_step)
    assert main(["fit", "--config", config, "--run_dir", "run"]) == 143
    stderr = capsys.readouterr().err
    assert stderr.count("terminated") == 1
    assert "Traceback" not in stderr
