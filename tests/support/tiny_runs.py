"""A finished run of the tiny configuration, which is trained once for all tests and copied by each."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

import pytest
from made_once import made_once
from tiny_app import CONFIG

from apps.cli import main


def _train(folder: Path) -> None:
    (folder / "tiny.yaml").write_text(CONFIG)
    with contextlib.chdir(folder):
        assert main(["fit", "--config", "tiny.yaml", "--run_dir", "run"]) == 0


def copy_run(factory: pytest.TempPathFactory, folder: Path, run_dir: str = "run") -> Path:
    """Copy the run into a folder, with ``tiny.yaml`` beside it, as a training there with ``run_dir`` leaves both."""
    made = made_once(factory, "tiny_run", _train)
    shutil.copy(made / "tiny.yaml", folder)
    run = Path(shutil.copytree(made / "run", folder / "run"))
    for file in (run / "config.yaml", run / "tensorboard" / "hparams.yaml"):
        file.write_text(file.read_text().replace("run_dir: run\n", f"run_dir: {run_dir}\n"))
    return run
