"""A small configuration in an empty working folder, and a finished run of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_app import CONFIG
from tiny_runs import copy_run

from apps.report.page import html


@pytest.fixture(autouse=True)
def without_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Write reports with tables alone, which is quicker."""
    monkeypatch.setattr(html, "script", lambda: "")


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """``tiny.yaml`` in an empty working folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.yaml").write_text(CONFIG)
    return "tiny.yaml"


@pytest.fixture
def run(config: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of ``tiny.yaml`` in the working folder."""
    copy_run(tmp_path_factory, tmp_path)
    return Path("run")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run's folder."""
    folder = tmp_path_factory.mktemp("trained")
    return copy_run(tmp_path_factory, folder, str(folder / "run"))
