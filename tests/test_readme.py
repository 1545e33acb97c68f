"""README keeps its word: its Python runs, its commands run on digits with the debug overlay, its targets exist."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from undrawn import undrawn as undrawn

import core
from apps.cli import main

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)


def commands(program: str) -> list[list[str]]:
    """Return the words of every command line that begins with ``program``."""
    lines = [line for block in blocks("sh") for line in block.splitlines()]
    lines += re.findall(rf"`({program} [^`]*)`", README)
    return [shlex.split(line, comments=True) for line in lines if line.startswith(f"{program} ")]


def test_the_python_block_runs():
    (source,) = blocks("python")
    names: dict[str, object] = {}
    exec(compile(source, "README.md", "exec"), names)
    stats = core.RoutingStats.from_tape(names["tape"])
    # The engine's example: 64 tokens, 2 of 8 experts each.
    assert stats.layers[""].tokens_per_expert.sum().item() == 128


def test_it_is_one_screen():
    words = re.sub(r"^```.*?^```$", "", README, flags=re.DOTALL | re.MULTILINE).split()
    assert len(words) <= 700


@pytest.mark.pages
def test_moesaic_commands_run_on_digits_with_the_debug_overlay(tmp_path, monkeypatch, capfd):
    typed = commands("moesaic")
    assert {words[1] for words in typed} == {"fit", "test", "predict", "compare", "data", "plan", "init"}
    rows = [f"{20 + i % 40},{'north' if i % 3 else 'south'},{i % 2}\n" for i in range(200)]
    (tmp_path / "customers.csv").write_text("age,region,bought\n" + "".join(rows))
    # A copy of the configurations, for run folders are made where a command is run.
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for words in typed:
        arguments = words[1:]
        if words[1] in ("fit", "test", "predict") and "configs/debug.yaml" not in words:
            arguments += ["--config", "configs/debug.yaml"]
        elif words[1] == "compare":
            # Two steps of each model say whether the command works, not which is better.
            arguments = [a if a != "3" else "1" for a in arguments]
            arguments += ["--overlay", "configs/debug.yaml", "--learning_rates", "0.001", "--rounds", "0"]
            arguments += ["--baselines", "dense_equal_flops"]
        # In this process: twelve of their own would load torch and Lightning twelve times.
        assert main(arguments) == 0, f"{' '.join(words)}\n{capfd.readouterr().err[-2000:]}"


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_targets_exist():
    targets = {words[1] for words in commands("make")}
    assert {"demo", "test"} <= targets
    for target in sorted(targets):
        done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
