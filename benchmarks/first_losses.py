"""The first training losses of every configuration, to hold a change of structure to them: nothing may move.

    python benchmarks/first_losses.py --output before.json
    python benchmarks/first_losses.py --against before.json
    python benchmarks/first_losses.py --only vision nlp/software --root multi30k=DIR cifar10=DIR

Each configuration, and each router of ``configs/routing`` over the digits, trains ten steps on the CPU with one thread,
as its own ``moesaic fit`` would. Losses are compared as they are written, digit by digit. A configuration whose data
cannot be fetched is named and left out; ``--root`` gives a dataset's own folder.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
APPS = ("vision", "recsys", "nlp")
FLAGS = {
    "trainer.max_steps": "10",
    "trainer.max_epochs": "1000",
    "trainer.log_every_n_steps": "1",
    "trainer.limit_val_batches": "0",
    "trainer.num_sanity_val_steps": "0",
    "trainer.accelerator": "cpu",
    "trainer.devices": "1",
    "trainer.enable_progress_bar": "false",
}
FEWER_ROWS = {"recsys/ten_million_rows.yaml": ("--data.synthetic.num_rows", "20000")}


def runs() -> dict[str, list[str]]:
    """Return the configurations of each run, by name."""
    files = [path for app in APPS for path in sorted((ROOT / "configs" / app).glob("*.yaml"))]
    configs = {str(path.relative_to(ROOT / "configs")): [str(path.relative_to(ROOT))] for path in files}
    for path in sorted((ROOT / "configs" / "routing").glob("*.yaml")):
        configs[f"digits + {path.stem}"] = ["configs/vision/digits.yaml", str(path.relative_to(ROOT))]
    return configs


def losses(name: str, configs: Sequence[str], roots: dict[str, str], tree: Path) -> list[str] | str:
    """Return the losses of the first steps as they are written, or the line that says why there are none."""
    config: dict[str, Any] = yaml.safe_load((tree / configs[0]).read_text())
    dataset = config["data"].get("init_args", {}).get("dataset", "")
    with tempfile.TemporaryDirectory() as folder:
        argv = [word for path in configs for word in ("--config", path)]
        argv += [word for key, value in FLAGS.items() for word in (f"--{key}", value)]
        argv += [*FEWER_ROWS.get(name, ()), "--run_dir", f"{folder}/run"]
        argv += ["--data.root", roots[dataset]] if dataset in roots else []
        done = subprocess.run(
            [sys.executable, "-m", "apps.cli", "fit", *argv],
            cwd=tree,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tree)},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            return (done.stderr.strip().splitlines() or ["no message"])[-1]
        with open(f"{folder}/run/metrics.csv") as file:
            return [row["train/loss"] for row in csv.DictReader(file) if row.get("train/loss")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the losses there")
    parser.add_argument("--against", type=Path, metavar="FILE", help="compare them with those written before")
    parser.add_argument("--only", nargs="+", default=[""], metavar="PREFIX", help="runs whose name begins so")
    parser.add_argument("--root", nargs="+", default=[], metavar="DATASET=DIR", help="folders of datasets")
    parser.add_argument("--tree", type=Path, default=ROOT, metavar="DIR", help="another checkout to run")
    args = parser.parse_args()
    roots = dict(pair.split("=", 1) for pair in args.root)
    before = json.loads(args.against.read_text()) if args.against else {}
    now: dict[str, list[str] | str] = {}
    moved = 0
    for name, configs in runs().items():
        if not name.startswith(tuple(args.only)) or not all((args.tree / path).is_file() for path in configs):
            continue
        outcome = now[name] = losses(name, configs, roots, args.tree)
        known = before.get(name)
        line = outcome if isinstance(outcome, str) else f"{outcome[0]} ... {outcome[-1]}"
        if isinstance(known, list):
            is_same = known == outcome
            moved += not is_same
            line += "  as before" if is_same else f"  MOVED from {known[0]} ... {known[-1]}"
        print(f"{name}: {line}", flush=True)
        if args.output:
            args.output.write_text(json.dumps(now, indent=1) + "\n")
    print(f"{len(now)} runs, {moved} moved")
    return int(bool(moved))


if __name__ == "__main__":
    sys.exit(main())
