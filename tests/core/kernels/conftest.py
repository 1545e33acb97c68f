"""Triton's kernels are tested where Triton is installed: it is for Linux."""

from __future__ import annotations

import importlib.util

import pytest


@pytest.fixture(autouse=True)
def _needs_triton(request: pytest.FixtureRequest) -> None:
    chosen = getattr(request.node, "callspec", None)
    if chosen and "triton" in chosen.params.values() and importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
