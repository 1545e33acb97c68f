"""Print what has changed in speed and in reports' sizes since the last release, side by side. Nothing is judged.

    moesaic bench since
    moesaic bench since --revision v0.1.0 --rounds 11

The tree of the revision is unpacked beside this one. Both time the layer against a dense FFN of equal active FLOPs, and
both train the digits for a few steps and write the page of a test.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from apps.base.files import CONFIGS

ROOT = CONFIGS.parent
LAYER = "benchmarks/layer.py --shapes E8 --dtypes float32 --json layer.json --rounds"
DIGITS = "--config {tree}/configs/vision/digits.yaml --config {tree}/configs/debug.yaml --run_dir run"
COMMANDS = (f"{{tree}}/{LAYER} {{rounds}}", f"-m apps.cli fit {DIGITS}", f"-m apps.cli test {DIGITS}")


def git(*words: str) -> str:
    return subprocess.run(["git", "-C", str(ROOT), *words], check=True, capture_output=True, text=True).stdout.strip()


def figures(tree: Path, folder: Path, rounds: int) -> dict[str, float]:
    """Return ratios and sizes of a tree by name; its runs go to a folder."""
    folder.mkdir()
    for command in COMMANDS:
        words = [sys.executable, *command.format(tree=tree, rounds=rounds).split()]
        environment = {**os.environ, "PYTHONPATH": str(tree)}
        subprocess.run(words, cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)
    rows = json.loads((folder / "layer.json").read_text())["rows"]
    sizes = {f"{path.name}, KiB": path.stat().st_size / 1024 for path in sorted((folder / "run").glob("report.*"))}
    return {f"{row['system']}, times dense": row["ratio"] for row in rows} | sizes


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--revision", help="a tag or commit (default: that of the newest version in the changelog)")
    parser.add_argument("--rounds", type=int, default=11)
    args = parser.parse_args(argv)
    heading = re.findall(r"^## \[\d.*", (ROOT / "CHANGELOG.md").read_text(), re.M)[0]
    revision = args.revision or git("log", "-1", "--format=%H", f"-S{heading}", "--", "CHANGELOG.md")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        git("archive", f"--output={folder / 'tree.tar'}", revision)
        shutil.unpack_archive(folder / "tree.tar", folder / "tree", filter="data")
        then, now = figures(folder / "tree", folder / "then", args.rounds), figures(ROOT, folder / "now", args.rounds)
    print(f"| | {revision[:12]} | now | ratio |\n|---|---|---|---|")
    for name in {**then, **now}:
        before, after = then.get(name, math.nan), now.get(name, math.nan)
        print(f"| {name} | {before:.4g} | {after:.4g} | {after / before:.3f} |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
