"""A small configuration in an empty working folder, and a finished run of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_app import CONFIG

from apps.cli import main


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """``tiny.yaml`` in an empty working folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    return "tiny.yaml"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run's folder."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "tiny.yaml").write_text(CONFIG)
    assert main(["fit", "--config", str(folder / "tiny.yaml"), "--run_dir", str(folder / "run")]) == 0
    return folder / "run"
