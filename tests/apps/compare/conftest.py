"""A configuration of a model and data that are as small as can be."""

from __future__ import annotations

from pathlib import Path

import pytest
from compared import CONFIG


@pytest.fixture
def config(tmp_path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(CONFIG)
    return path
