"""All that waits for a GPU, in one command, and a table of it to commit.

    make gpu                                # or: python benchmarks/gpu.py
    make gpu ARGS='--only tests layer'      # some of the parts

The parts are the tests that need a card, the MoE layer beside its peers, one training per app, and trainings on two
GPUs where there are two. A part that fails is a row of the table, with the last line that it printed, and the next one
runs. `docs/runs/gpu.json` and `docs/runs/gpu.md` are written after each part.
"""

from __future__ import annotations

import argparse
import csv
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from apps.base.machine import machine_facts

ROOT = Path(__file__).parents[1]
APPS = {
    "vision": "vision/digits",
    "tables": "recsys/synthetic",
    "histories": "recsys/movielens_1m_next_item",
    "retrieval": "recsys/movielens_1m_retrieval",
    "translation": "nlp/multi30k_en_de",
    "language": "nlp/text_mixtral_like",
    "pairs": "multimodal/shapes",
    "captions": "multimodal/shapes_captions",
}
PARALLEL = ("ddp", "fsdp", "expert_parallel")
SHOWN = ("train/examples_per_second", "train/loss", "val/loss")


@dataclass(frozen=True)
class Part:
    """One part of the command.

    Attributes:
        name: its name in the table and for ``--only``.
        command: what runs, after the interpreter.
        json: the file that it writes, whose contents are kept whole; None: none.
        run_dir: the folder of its training, whose last figures are kept; None: it is none.
    """

    name: str
    command: tuple[str, ...]
    json: Path | None = None
    run_dir: Path | None = None


@dataclass(frozen=True)
class Row:
    """The result of a part: its exit code, its seconds, its last line and its figures."""

    part: str
    command: str
    code: int
    seconds: float
    last_line: str
    figures: dict[str, Any] = field(default_factory=dict)


def parts(folder: Path, num_gpus: int) -> list[Part]:
    """Return the parts that ``num_gpus`` GPUs can run; what they write goes to ``folder``."""

    def fit(name: str, config: str, *options: str) -> Part:
        run_dir = folder / name
        one_epoch = ("--trainer.max_epochs", "1", "--trainer.accelerator", "gpu", "--run_dir", str(run_dir))
        command = ("-m", "apps.cli", "fit", "--config", f"configs/{config}.yaml", *options, *one_epoch)
        return Part(name, command, run_dir=run_dir)

    layer = folder / "layer.json"
    found = [
        Part("tests", ("-m", "pytest", "-q", "-m", "gpu")),
        Part("layer", ("benchmarks/layer.py", "--peers", "--json", str(layer)), json=layer),
        *(fit(f"fit-{app}", config, "--trainer.devices", "1") for app, config in APPS.items()),
    ]
    if num_gpus > 1:
        for overlay in PARALLEL:
            options = ("--config", f"configs/parallel/{overlay}.yaml", "--trainer.devices", "2")
            found.append(fit(f"two-{overlay}", APPS["vision"], *options))
    return found


def run(part: Part) -> Row:
    """Run a part, show what it prints, and return its row."""
    start, last = time.perf_counter(), ""
    command = [sys.executable, *part.command]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            last = line.strip() or last
    seconds = round(time.perf_counter() - start, 1)
    return Row(part.name, f"python {' '.join(part.command)}", process.returncode, seconds, last, figures(part))


def figures(part: Part) -> dict[str, Any]:
    """Return what a part has written: its JSON, or the last values of its training's log."""
    if part.json is not None and part.json.exists():
        return dict(json.loads(part.json.read_text()))
    log = None if part.run_dir is None else part.run_dir / "metrics.csv"
    if log is None or not log.exists():
        return {}
    with open(log) as file:
        rows = list(csv.DictReader(file))
    last = {name: [row[name] for row in rows if row.get(name)] for name in SHOWN}
    return {name: float(values[-1]) for name, values in last.items() if values}


def table(facts: dict[str, Any], rows: Sequence[Row]) -> str:
    """Return the results as Markdown."""
    lines = [
        "# What ran on a GPU",
        "",
        f"`make gpu`, {', '.join(f'{name} {value}' for name, value in facts.items())}.",
        "",
        "| part | result | seconds | examples per second | last line |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        rate = row.figures.get(SHOWN[0])
        result, last = "ok" if row.code == 0 else f"failed ({row.code})", row.last_line.replace("|", "\\|")
        lines.append(f"| {row.part} | {result} | {row.seconds:g} | {'' if rate is None else f'{rate:,.0f}'} | {last} |")
    systems = next((row.figures.get("rows", []) for row in rows if row.part == "layer"), [])
    if systems:
        lines += ["", "| layer | dtype | system | us per token |", "|---|---|---|---|"]
        lines += [
            f"| {r['shape']} | {r['dtype']} | {r['system']} | {r.get('us_per_token', float('nan')):.4g} |"
            for r in systems
        ]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None, start: Callable[[Part], Row] = run) -> int:
    parser = argparse.ArgumentParser(prog="gpu", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--only", nargs="+", help="the parts to run; default: all")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "runs", help="folder of gpu.json and gpu.md")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print(f"make gpu needs a CUDA GPU, and torch {torch.__version__} sees none: nothing was run", file=sys.stderr)
        return 1
    facts = {**machine_facts(), "gpus": torch.cuda.device_count()}
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        chosen = parts(Path(folder), facts["gpus"])
        if unknown := set(args.only or ()) - {part.name for part in chosen}:
            parser.error(f"--only {sorted(unknown)[0]} is not one of {', '.join(part.name for part in chosen)}")
        for part in chosen:
            if args.only and part.name not in args.only:
                continue
            print(f"== {part.name}", flush=True)
            rows.append(start(part))
            (args.out / "gpu.json").write_text(
                json.dumps({"facts": facts, "rows": [asdict(r) for r in rows]}, indent=1)
            )
            (args.out / "gpu.md").write_text(table(facts, rows))
    failed = [row.part for row in rows if row.code != 0]
    print(f"{len(rows)} parts, failed: {', '.join(failed) or 'none'}; commit {args.out}/gpu.json and gpu.md")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
