"""Scripts as the documentation prints them, run where nothing of the suite can be imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
_RUN = """
import sys
sys.modules.update(dict.fromkeys(("apps", "core", "torch")))  # an import of them fails
exec(compile(sys.stdin.read(), "script", "exec"))
"""


def script(page: str, call: str) -> str:
    """Return the code that stands after the words ``call`` in a page, such as docs/reference/onnx_scripts.md."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return text.partition(call)[2].partition("```python\n")[2].partition("```")[0]


def output(code: str, *arguments: str) -> str:
    """Return what a script prints, given these arguments."""
    command = [sys.executable, "-I", "-c", _RUN, *arguments]
    run = subprocess.run(command, input=code, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
    return run.stdout.rstrip("\n")
