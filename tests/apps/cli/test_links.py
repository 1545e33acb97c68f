"""Links in a run's folder that somebody else has made: nothing is written through them."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from commands import fails

from apps.cli import main
from apps.cli.write.partial import Partial


@pytest.fixture
def got(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run's folder, and beside it the file ``mine`` and the folder ``own``, which no run may touch."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained, tmp_path / "got")
    Path("mine").write_text("as it was")
    Path("own").mkdir()
    return Path("got")


def is_untouched() -> bool:
    return Path("mine").read_text() == "as it was" and not any(Path("own").iterdir())


def link(path: Path, target: str) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(Path(target).resolve())


def test_a_test_and_a_prediction_write_through_no_link(got):
    for name in ("test.json", "report.html", "report.json", "predictions.jsonl", "predictions.parquet", "report"):
        for planted in (f".{name}.tmp", f".{name}.rows.tmp", f".{name}.groups.tmp"):
            link(got / planted, "mine")
    link(got / "test.json", "mine")
    link(got / "predictions.parquet", "mine")
    assert main(["test", "--ckpt_path", "got"]) == 0
    assert main(["predict", "--ckpt_path", "got"]) == 0
    assert main(["predict", "--ckpt_path", "got", "--output", "got/predictions.parquet", "--overwrite"]) == 0
    assert is_untouched()
    assert "checkpoint" in (got / "test.json").read_text()


@pytest.mark.parametrize("name", ["report", "profile"])
def test_a_linked_folder_of_a_report_is_rejected(got, capsys, name):
    link(got / name, "own")
    line = fails(capsys, 1, "test", "--config", "got/config.yaml", "--run_dir", "got", "--trainer.profiler", "simple")
    assert line.startswith(f"got/{name} leads to {Path('own').resolve()}, ")
    assert is_untouched()


@pytest.mark.parametrize("name", ["checkpoints", "earlier/checkpoints", "tensorboard/hparams.yaml"])
def test_a_linked_folder_is_rejected_by_a_training(got, capsys, name):
    shutil.move(got / "checkpoints", "there")
    (got / name).parent.mkdir(exist_ok=True)
    link(got / name, "there")
    line = fails(capsys, 1, "fit", "--config", "got/config.yaml", "--run_dir", "got")
    assert line.startswith(f"got/{name} leads to ")
    assert sorted(path.name for path in Path("there").iterdir()) == ["best.ckpt", "last.ckpt"]


def test_a_linked_lock_is_not_followed(got, capsys):
    link(got / ".moesaic-run", "mine")
    assert ".moesaic-run" in fails(capsys, 1, "fit", "--config", "got/config.yaml", "--run_dir", "got")
    assert is_untouched()


def test_lines_of_a_stopped_prediction_that_are_a_link_are_not_followed(got):
    link(got / "rows.jsonl.partial", "mine")
    with (
        pytest.raises(ValueError, match=r"got/rows\.jsonl\.partial is a link"),
        Partial(got / "rows.jsonl", {"input": []}, True),
    ):
        pass
    assert is_untouched()


def test_a_run_that_is_a_link_is_used(got):
    Path("runs").symlink_to(Path("own").resolve())
    shutil.move(got, "own/got")
    Path("linked").symlink_to(Path("own/got").resolve())
    assert main(["test", "--config", "runs/got/config.yaml", "--run_dir", "runs/got"]) == 0
    assert main(["fit", "--config", "linked/config.yaml", "--run_dir", "linked"]) == 0
    assert main(["predict", "--config", "linked/config.yaml", "--run_dir", "linked", "--output", "runs/here.csv"]) == 0
    assert Path("own/here.csv").is_file()
