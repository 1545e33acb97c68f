"""A fixture for rooms whose tests run many small trainings in one process: their ``conftest.py`` names it."""

from __future__ import annotations

import gc

import pytest


@pytest.fixture(autouse=True)
def without_collections(monkeypatch) -> None:
    """Skip the collection after each run, which walks through all that earlier tests have left, a second each."""
    monkeypatch.setattr(gc, "collect", lambda: 0)
