"""Print what has changed in speed and in reports' sizes since the last release, side by side. Nothing is judged.

    moesaic bench since
    moesaic bench since --revision v0.1.0 --rounds 11

The tree of the revision is unpacked beside this one. Both time the layer against a dense FFN of equal active FLOPs, and
both train the digits for a few steps and write the page of a test.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from apps.base.files import CONFIGS

ROOT = CONFIGS.parent


def last_release() -> str:
    """Return the commit that gave the newest version its section in the changelog."""
    heading = re.findall(r"^## \[\d.*", (ROOT / "CHANGELOG.md").read_text(), re.M)[0]
    return git("log", "-1", "--format=%H", f"-S{heading}", "--", "CHANGELOG.md").decode().strip()


def git(*words: str) -> bytes:
    return subprocess.run(["git", "-C", str(ROOT), *words], check=True, capture_output=True).stdout


def figures(tree: Path, folder: Path, rounds: int) -> dict[str, float]:
    """Return ratios and sizes of a tree by name; its runs go to a folder."""
    folder.mkdir()
    digits = ["--config", str(tree / "configs/vision/digits.yaml"), "--config", str(tree / "configs/debug.yaml")]
    layer = ["--shapes", "E8", "--dtypes", "float32", "--rounds", str(rounds), "--json", "layer.json"]
    for words in (
        [str(tree / "benchmarks/layer.py"), *layer],
        ["-m", "apps.cli", "fit", *digits, "--run_dir", "run"],
        ["-m", "apps.cli", "test", *digits, "--run_dir", "run", "--ckpt_path", "best"],
    ):
        environment = {**os.environ, "PYTHONPATH": str(tree)}
        subprocess.run([sys.executable, *words], cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)
    rows = json.loads((folder / "layer.json").read_text())["rows"]
    sizes = {path.name: path.stat().st_size / 1024 for path in (folder / "run").glob("report.*")}
    return {f"{row['system']}, times dense": row["ratio"] for row in rows} | {
        f"{name}, KiB": size for name, size in sorted(sizes.items())
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--revision", help="a tag or commit (default: that of the last release)")
    parser.add_argument("--rounds", type=int, default=11)
    args = parser.parse_args(argv)
    revision = args.revision or last_release()
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(fileobj=io.BytesIO(git("archive", revision))) as archive:
            archive.extractall(Path(folder, "tree"), filter="data")
        then = figures(Path(folder, "tree"), Path(folder, "then"), args.rounds)
        now = figures(ROOT, Path(folder, "now"), args.rounds)
    print(f"| | {revision[:12]} | now | ratio |\n|---|---|---|---|")
    for name in [*then, *(now.keys() - then.keys())]:
        before, after = then.get(name, float("nan")), now.get(name, float("nan"))
        print(f"| {name} | {before:.4g} | {after:.4g} | {after / before:.3f} |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
