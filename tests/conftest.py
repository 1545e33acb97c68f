"""Set before any test is read, and so before anything imports Triton."""

from __future__ import annotations

import atexit
import gc
import importlib.util
import os
import sys
from collections.abc import Generator
from pathlib import Path

import pytest

# One thread for each of xdist's workers and the processes that they start: more would wait for each other. Torch reads
# it when it is imported, which the conftest.py of a folder below may do before pytest_configure.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Imports leave hardly any garbage, and looking for it is a quarter of their time. Collection is on again for the tests.
gc.disable()

_HERE = Path(__file__).parent

if importlib.util.find_spec("torchrec") is None:  # it is for Linux on x86-64
    collect_ignore_glob = [
        *("apps/recsys/tables/*", "apps/recsys/retrieval/*", "apps/recsys/encoding/test_table_encoding.py"),
        *("apps/plan/test_inputs.py", "apps/serve/service/test_app*.py", "apps/train/test_healthy_runs.py"),
        *("apps/verdict/test_command.py", "test_configs.py"),
    ]


def pytest_addoption(parser: pytest.Parser) -> None:
    # Triton's kernels run on the CPU, one program after the other, on a machine with a card too: whichever of the two
    # it is holds for the whole process. A folder's conftest.py may import Triton before pytest_configure. xdist's
    # workers have the choice of the process that started them.
    if "PYTEST_XDIST_WORKER" not in os.environ:
        chosen = parser.parse_known_args(sys.argv[1:]).markexpr or ""
        on_gpu = "gpu" in chosen and "not gpu" not in chosen
        os.environ["TRITON_INTERPRET"] = "0" if on_gpu else "1"
        if not on_gpu:  # a run takes a GPU that it sees, in the processes that a test starts too
            os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("slow"):
            item.add_marker(pytest.mark.timeout(3600))
    # Those of the documentation are long, and one that comes last keeps the other workers waiting.
    items.sort(key=lambda item: item.path.parent != _HERE)


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    try:
        return (yield)
    finally:
        # What is imported by now stays to the end, half a million objects of torch and others: a collection in a test
        # need not walk through them, which was half of a comparison's time.
        gc.freeze()
        gc.enable()


# For what Python frees at its end. Pytest's own collections before that would walk through all of it, for seconds.
atexit.register(gc.unfreeze)
