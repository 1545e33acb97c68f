"""The first ten training losses of every configuration on a CPU, by which a change of structure is checked.

    python benchmarks/first_losses.py --output before.json
    python benchmarks/first_losses.py --check docs/runs/first_losses.json
    python benchmarks/first_losses.py --only vision nlp/software --data_root multi30k=DIR cifar10=DIR

Each run is the first ``moesaic fit`` in a configuration's header that names the file, with seed 0 and one thread. A run
is left out, with the reason, if its data are not on this machine, or if it needs another run or several processes.
``--check`` has a relative tolerance of 1e-4 (up to 2e-3 for two runs), since processors differ; it exits with 1 if
a loss differs or a run fails.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import io
import json
import math
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import yaml

import apps
from apps.cli import main as moesaic
from apps.data import datasets

ROOT = Path(apps.__file__).parents[1]
KEPT = ROOT / "docs" / "runs" / "first_losses.json"
ABSENT = "is not on this machine"
TOLERANCE = 1e-4
# Muon and thresholds enlarge rounding: the same code differs by 4e-4 and 9e-4 on two machines.
LOOSE = {"multimodal/shapes": 1e-3, "routing/dynamic_threshold": 2e-3}
FLAGS = {
    "seed_everything": "0",
    "trainer.max_steps": "10",
    "trainer.max_epochs": "1000",
    "trainer.log_every_n_steps": "1",
    "trainer.limit_val_batches": "0",
    "trainer.num_sanity_val_steps": "0",
    "trainer.accelerator": "cpu",
    "trainer.devices": "1",
}
FEWER_ROWS = {"recsys/ten_million_rows": ("--data.synthetic.num_rows", "20000")}


def runs() -> dict[str, list[str]]:
    """Return the configurations of each run, by the name of the one that is tried."""
    found = {}
    for own in sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "configs").rglob("*.yaml")):
        for command in re.findall(r"^# +moesaic fit (.*(?:\\\n#.*)*)", (ROOT / own).read_text(), re.M):
            configs = re.findall(r"--config (\S+)", command)
            if own in configs and "configs/parallel/" not in own:
                found[own.removeprefix("configs/").removesuffix(".yaml")] = configs
                break
    return found


def absent(dataset: str, roots: Mapping[str, str]) -> str:
    """Return why the data are not on this machine; "": they are, or are made when they are needed."""
    is_fetched = dataset in {known.name for known in datasets.list_datasets()} - roots.keys()
    return f"{dataset} {ABSENT}" if is_fetched and not datasets.available(dataset) else ""


def fault(name: str, now: Sequence[float] | str, before: Sequence[float]) -> str:
    """Return how the losses of a run differ from the kept ones, but for what processors differ by; "": they do not."""
    if isinstance(now, str):
        return "" if now.endswith(ABSENT) else now
    tolerance = LOOSE.get(name, TOLERANCE)
    close = (math.isclose(a, b, rel_tol=tolerance) for a, b in zip(now, before, strict=False))
    return "" if len(now) == len(before) and all(close) else f"DIFFERS from {before}: {now}"


def losses(name: str, configs: Sequence[str], roots: Mapping[str, str]) -> list[float] | str:
    """Return the losses of the first steps, or the line that says why there are none."""
    config = yaml.safe_load((ROOT / configs[0]).read_text())
    dataset = config["data"].get("init_args", {}).get("dataset", "")
    if reason := absent(dataset, roots):
        return reason
    argv = [word for path in configs for word in ("--config", str(ROOT / path))]
    argv += [word for key, value in FLAGS.items() for word in (f"--{key}", value)]
    argv += [*FEWER_ROWS.get(name, ()), "--run_dir", "run"]
    argv += ["--data.root", roots[dataset]] if dataset in roots else []
    said = io.StringIO()
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
            code = moesaic(["fit", *argv])
        if code:
            return (said.getvalue().strip().splitlines() or ["no message"])[-1]
        with open("run/metrics.csv") as file:
            return [float(row["train/loss"]) for row in csv.DictReader(file) if row.get("train/loss")]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the losses there, as JSON")
    parser.add_argument("--check", type=Path, metavar="FILE", help="compare with the losses in this file")
    parser.add_argument("--only", nargs="+", default=[""], metavar="PREFIX", help="runs whose name starts like this")
    parser.add_argument("--data_root", nargs="+", default=[], metavar="DATASET=DIR", help="folders of datasets")
    args = parser.parse_args()
    torch.set_num_threads(1)
    roots = dict(pair.split("=", 1) for pair in args.data_root)
    before = json.loads(args.check.read_text()) if args.check else {}
    now: dict[str, list[float]] = {}
    failures = 0
    for name, configs in runs().items():
        if not name.startswith(tuple(args.only)) or (args.check and name not in before):
            continue
        outcome = losses(name, configs, roots)
        wrong = fault(name, outcome, before[name]) if name in before else ""
        failures += bool(wrong)
        if isinstance(outcome, str):
            line = outcome
        else:
            now[name] = outcome
            line = f"{outcome[0]:.6g} ... {outcome[-1]:.6g}  {wrong or 'as before' * (name in before)}"
        print(f"{name}: {line}", flush=True)
        if args.output:
            args.output.write_text("{\n" + ",\n".join(f'"{k}": {json.dumps(v)}' for k, v in now.items()) + "\n}\n")
    print(f"{len(now)} runs, {failures} differ")
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main())
