"""docs/tutorials and docs/start: the blocks of each page run as they stand, in order, in an empty folder."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(page for folder in ("start", "tutorials") for page in (ROOT / "docs" / folder).glob("*.md"))
SLOW = {"commands", "first_run", "images", "images_texts", "serve", "table", "translator", "two_processes"}
SLOW |= {"your_network", "your_router"}
"""Pages that take over half a minute of one core."""
BLOCK = re.compile(r"(?:`([\w/.-]+\.\w+)`:\n\n)?^```(sh|python|yaml)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)


def environment_for(tmp_path: Path) -> dict[str, str]:
    """Return an environment in which ``moesaic`` and ``python`` are those of this tree."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, start in (("python", ""), ("moesaic", "-m apps.cli "), ("torchrun", "-m torch.distributed.run ")):
        (programs / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {start}"$@"\n')
        (programs / name).chmod(0o755)
    return os.environ | {
        "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=pytest.mark.slow if page.stem in SLOW else (), id=page.stem)
        for page in PAGES
        if BLOCK.search(page.read_text(encoding="utf-8"))
    ],
)
def test_the_blocks_of_a_page_run(page, tmp_path):
    environment, work = environment_for(tmp_path), tmp_path / "work"
    work.mkdir()
    blocks = BLOCK.findall(page.read_text(encoding="utf-8"))
    started: list[int] = []
    try:
        run(blocks, work, environment, started)
    finally:
        for group in started:  # a server that a failed page has left behind
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)


def run(blocks: list[tuple[str, str, str]], work: Path, environment: dict[str, str], started: list[int]) -> None:
    """Write the blocks that are files, and run the others.

    Args:
        started: gets the process group of each block that is run. A block may leave a program in the background, such
            as a server, that a later one stops.
    """
    for file, language, source in blocks:
        if file:
            (work / file).write_text(source)
            continue
        assert language != "yaml", f"a block without a file name:\n{source}"
        command = ["bash", "-euo", "pipefail", "-c", source] if language == "sh" else [sys.executable, "-c", source]
        with subprocess.Popen(
            command,
            cwd=work,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        ) as process:
            started.append(process.pid)
            try:
                output, _ = process.communicate(timeout=500)
            except BaseException:
                os.killpg(process.pid, signal.SIGKILL)
                raise
        assert process.returncode == 0, f"{source}\n{output[-4000:]}"
