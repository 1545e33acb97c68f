"""The folders of the tree and of the tests' helpers, and the environment in which a process imports from both."""

from __future__ import annotations

import os
from pathlib import Path

SUPPORT = Path(__file__).resolve().parent
ROOT = SUPPORT.parents[1]


def environment(*folders: Path | str, **variables: str) -> dict[str, str]:
    """Return this process's environment in which Python also imports from ``folders``, the tree and the helpers."""
    path = os.pathsep.join(map(str, (*folders, ROOT, SUPPORT)))
    return {**os.environ, "PYTHONPATH": path, **variables}
