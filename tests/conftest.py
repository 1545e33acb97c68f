"""Set before any test is read, and so before anything imports Triton."""

from __future__ import annotations

import os

import pytest


def pytest_configure(config: pytest.Config) -> None:
    # Triton's kernels run on the CPU, one program after the other, on a machine with a card too: whichever of the two
    # it is holds for the whole process.
    chosen = config.getoption("markexpr")
    os.environ["TRITON_INTERPRET"] = "0" if "gpu" in chosen and "not gpu" not in chosen else "1"
