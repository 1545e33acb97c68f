"""A configuration of a model and data that are as small as can be, and a comparison that is finished."""

import shutil
from pathlib import Path

import pytest
from collections_left_out import without_collections as without_collections
from compared import CONFIG, asked, offers

from apps.cli import main as moesaic
from apps.report.page import html

KEPT = (*offers("dense_equal_flops", "centroids", "tuned_centroids"), "--model.keeps_examples", "true")
"""Values of the configuration of ``finished``."""


@pytest.fixture(autouse=True)
def without_charts(monkeypatch) -> None:
    """Write reports with tables alone, which is quicker; that of ``whole`` has its charts."""
    monkeypatch.setattr(html, "script", lambda: "")
    monkeypatch.setattr(html, "png_of", lambda *_: b"")


@pytest.fixture(scope="session")
def config(tmp_path_factory) -> Path:
    """One file for all tests, which share what is read of it; only to be read."""
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(CONFIG)
    return path


@pytest.fixture(scope="session")
def whole(config, tmp_path_factory) -> Path:
    """The folder of a finished comparison of the sparse model, "dense_equal_flops" and "centroids"; only to be read."""
    folder = tmp_path_factory.mktemp("whole")
    argv = asked(config, folder / "out", *KEPT, "--baselines", "dense_equal_flops", "centroids")
    assert moesaic(argv) == 0
    return folder / "out"


@pytest.fixture
def finished(whole, config, tmp_path) -> tuple[Path, list[str]]:
    """A copy of ``whole`` to go on in, and the arguments of its command without its baselines."""
    shutil.copytree(whole, tmp_path / "finished")
    return tmp_path / "finished", asked(config, tmp_path / "finished", *KEPT)
