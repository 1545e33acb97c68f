"""How much of a sparse model's gain a dense model keeps that learns from it, on the made table that sparse wins.

    python benchmarks/distilled.py                   # 15 trainings of 1,500 steps, about 10 minutes of one core

The table is ``made_wins`` of ``benchmarks/verdict.py``: eight groups of rows, each with a small network of its own.
The sparse model is an MMoE of 8 experts of width 32, of which a row takes 2; the dense one has one network of width 72,
of equal FLOPs. A dense model that is taught has the sparse model of its seed as its teacher (``model.distil``). Each
run is one of ``moesaic fit`` and ``moesaic test``; a second call goes on with what is missing.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml
from verdict import TASKS, Folders

from apps.base.files import replacing
from apps.base.machine import machine_line
from apps.data.given import GivenData
from apps.recsys.own_table import config_for

ROOT = Path(__file__).resolve().parents[1]
NUMBERS = ROOT / "docs" / "runs" / "distilled.json"
DENSE = ("--model.shared", "SharedBottom", "--model.shared.expert", "core.MLP")
WIDTH = ("--model.shared.expert.hidden_dims", "[72]")
SYSTEMS: dict[str, tuple[str, ...] | None] = {
    "sparse": None,
    "dense": (),
    "taught, weight 0.25": ("--model.distil.weight", "0.25"),
    "taught, weight 0.75": ("--model.distil.weight", "0.75"),
    "taught, weight 1": ("--model.distil.weight", "1.0"),
    "taught, weight 0.25, copy": ("--model.distil.weight", "0.25", "--model.distil.copy", "true"),
}
"""Options of each system beside the sparse one's; () is dense without a teacher."""


def write_config(work: Path) -> Path:
    """Return the configuration of the sparse model, which is that of ``moesaic verdict`` for the table."""
    data = work / "data"
    data.mkdir(parents=True, exist_ok=True)
    words = TASKS["made_wins"].words(Folders(work), data)
    assert words is not None
    made = config_for(GivenData((Path(words[0]),), "target", work / "given", "binary"))
    assert made is not None
    path = work / "config.yaml"
    with replacing(path) as file:
        yaml.safe_dump(dict(made.config), file, sort_keys=False)
    return path


def auc_of(system: str, seed: int, config: Path, work: Path) -> float:
    """Return the test AUC of one run, trained where it is not there yet."""
    folder = work / "runs" / f"{system.replace(', ', '-').replace(' ', '_')}-{seed}"
    if not (folder / "test.json").exists():
        options = ["--seed_everything", str(seed), "--model.optimizer.lr", "0.006", "--model.report", "null"]
        own = SYSTEMS[system]
        if own is not None:
            options += [*DENSE, *WIDTH, *own]
            options += ["--model.distil.teacher", str(work / "runs" / f"sparse-{seed}")] if own else []
        run("fit", "--config", str(config), "--run_dir", str(folder), *options)
        run("test", "--config", str(folder / "config.yaml"), "--run_dir", str(folder), "--ckpt_path", "last")
    return float(json.loads((folder / "test.json").read_text(encoding="utf-8"))["test/auc"])


def run(*words: str) -> None:
    command = [sys.executable, "-m", "apps.cli", *words, "--trainer.enable_progress_bar", "false"]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def markdown(auc: dict[str, list[float]]) -> str:
    """Return a table of the systems; the share kept is that of the sparse model's gain on dense, seed by seed."""
    rows = ["| model | test AUC, seeds | mean | share of the gain kept, seeds |", "|---|---|---|---|"]
    gains = [a - b for a, b in zip(auc["sparse"], auc["dense"], strict=True)]
    for system, own in auc.items():
        kept = [(a - b) / gain for a, b, gain in zip(own, auc["dense"], gains, strict=True)]
        shares = "" if system in ("sparse", "dense") else ", ".join(f"{share:.0%}" for share in kept)
        values = ", ".join(f"{value:.4f}" for value in own)
        rows.append(f"| {system} | {values} | {statistics.mean(own):.4f} | {shares} |")
    return "\n".join(rows)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--work", type=Path, default=Path("runs") / "distilled", help="folder of data and runs")
    args = parser.parse_args(argv)
    work = args.work.resolve()
    config = write_config(work)
    auc: dict[str, list[float]] = {system: [] for system in SYSTEMS}
    for seed in args.seeds:
        for system, values in auc.items():
            values.append(auc_of(system, seed, config, work))
    numbers: dict[str, Any] = {"machine": machine_line(), "seeds": args.seeds, "test_auc": auc}
    with replacing(NUMBERS) as file:
        file.write(json.dumps(numbers, indent=1) + "\n")
    print(markdown(auc))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
