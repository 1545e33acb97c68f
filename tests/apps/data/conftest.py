"""Datasets that a test registers."""

from __future__ import annotations

import pytest

import apps.registry
from apps.data import datasets


@pytest.fixture(autouse=True)
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget what a test registers when it ends; what the apps register stays."""
    apps.registry.import_datasets()
    monkeypatch.setattr(datasets, "_REGISTRY", dict(datasets._REGISTRY))
