"""A language model adapted to a domain: what it gains there, and what it forgets elsewhere.

    python benchmarks/domains.py bench/domains     # configs/nlp/domains.yaml says how its text files are made

Small models (``benchmarks/domains.yaml``) train on package descriptions, the Bible and software strings, and then on
manual pages: a dense one without and with replay, and DEMix by a new expert, while all else is frozen. Branch-Train-MiX
joins the dense model before and the one after, without training. Each is tested on all domains, and on the King James
Bible, whose domain no model is told.
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path
from typing import Any

import yaml

from apps.base.files import CONFIGS
from apps.base.machine import machine_facts
from apps.cli import main as moesaic

ROOT = CONFIGS.parent
CONFIG, OVERLAY = CONFIGS / "nlp/domains.yaml", ROOT / "benchmarks/domains.yaml"
TEXTS = yaml.safe_load(CONFIG.read_text())["data"]["init_args"]["domains"]
OLD, DENSE = {"packages": 1, "bible": 1, "software": 1}, ("--model.moe", "null")
TEXTS["kjv"] = {"dataset": "bible", "language": "en_KJV"}


def run(*words: Any, **data: Any) -> None:
    if moesaic([*map(str, words), *(word for name in data for word in (f"--data.{name}", json.dumps(data[name])))]):
        raise SystemExit(f"failed: {words}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of the runs")
    folder = parser.parse_args(argv).folder

    def fit(name: str, steps: int, weights: dict[str, int], *words: Any) -> None:
        length = ("--trainer.max_steps", steps, "--trainer.val_check_interval", steps)
        words = ("--config", CONFIG, "--config", OVERLAY, "--run_dir", folder / name, *length, *words)
        texts = {n: TEXTS[n] for n in weights}
        run("fit", *words, domains=texts, weights=weights)

    def tested(name: str, weights: dict[str, int]) -> list[dict[str, str]]:
        run("test", "--ckpt_path", folder / name, domains={n: TEXTS[n] for n in weights}, weights=weights)
        return [*csv.DictReader((folder / name / "report/domains.csv").read_text().splitlines())]

    frozen = json.dumps({"model": 0} | {f"model.decoder.layers.{i}.ffn.experts": 1 for i in range(2)})
    grown = ("--model.moe.num_experts", 4, "--model.moe.router.num_domains", 4, "--model.optimizer.lr_scales", frozen)
    fit("dense", 500, OLD, *DENSE)
    fit("continued", 150, {"manuals": 1}, *DENSE, "--weights", folder / "dense")
    fit("replay", 150, OLD | {"manuals": 9}, *DENSE, "--weights", folder / "dense")
    fit("demix", 500, OLD)
    fit("grown", 150, dict.fromkeys(OLD, 0) | {"manuals": 1}, *grown, "--model.grow.checkpoint", folder / "demix")
    mixed = ("--how", "btx", "--moe", ROOT / "benchmarks/domains_mixed.yaml", "--gates", "examples")
    run("convert", "merge", "--output", folder / "mixed", *mixed, "--ckpt_path", folder / "dense", folder / "continued")
    run("convert", "prune", "--output", folder / "without", "--ckpt_path", folder / "grown", "--without", "manuals")
    rows = {name: tested(name, OLD) + tested(name, {"kjv": 1}) for name in ("demix", "without")}
    for name in ("dense", "continued", "replay", "grown", "mixed"):
        rows[name] = tested(name, OLD) + tested(name, OLD | {"manuals": 1})[-1:] + tested(name, {"kjv": 1})
    kept = {"command": f"python benchmarks/domains.py {folder}", "seed": 0, "machine": machine_facts(), "rows": rows}
    (ROOT / "docs/runs/domains.json").write_text(json.dumps(kept, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
