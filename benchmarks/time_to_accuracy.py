"""How good a classifier is after some seconds of training: convolutions, dense and sparse, beside what else is used.

    python benchmarks/time_to_accuracy.py digits --seconds 2 6 --seeds 3
    python benchmarks/time_to_accuracy.py fashion_mnist --seconds 20 60 300 --seeds 3

Seconds are those of the processor, on one thread. Every network is trained by ``moesaic fit`` with its recipe, which is
fitted to the seconds: its pace is measured first, and the schedule ends when they are over. The support vector machine
of scikit-learn (RBF) gets as many images as it can use in the seconds. The test set is read once a run. Runs that the
file of figures has are not done again.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from sklearn.svm import SVC

import moesaic
from apps.base.files import read_json, replacing
from apps.base.machine import machine_line
from apps.report.page import Line, Point, ScatterChart, save_charts
from apps.vision.data import VisionData

ROOT = Path(__file__).resolve().parents[1]
NUMBERS, PICTURE = ROOT / "docs" / "runs" / "time_to_accuracy.json", ROOT / "docs" / "img" / "report"
PACE_STEPS, WARM_STEPS = 40, 10
ADAMW = {"model.optimizer.name": "adamw", "model.optimizer.adamw_parts": [], "model.optimizer.lr": 2e-3}
RESNET = {"model.conv": None, "model.moe": None, "model.backbone.name": "resnet18", **ADAMW}
WIDTHS, DENSE = {"model.conv.widths": [24, 48, 96]}, {"model.moe": None}
SMALL = {**WIDTHS, "model.moe.expert.hidden_dim": 192}
SYSTEMS: dict[str, dict[str, tuple[str, dict[str, Any]]]] = {
    "digits": {
        "conv": ("digits", DENSE),
        "conv with experts": ("digits", {}),
        "V-MoE": ("digits_vmoe", {"model.ema_decay": None}),
        "ResNet-18 of timm": ("digits", RESNET),
    },
    "fashion_mnist": {
        "conv 24-48-96": ("fashion_mnist", {**WIDTHS, **DENSE}),
        "conv 24-48-96 with experts": ("fashion_mnist", SMALL),
        "conv 32-64-128": ("fashion_mnist", DENSE),
        "conv 32-64-128 with experts": ("fashion_mnist", {}),
        "V-MoE": ("fashion_mnist_vmoe", {"model.ema_decay": None}),
        "ResNet-18 of timm": ("fashion_mnist", RESNET),
    },
}
"""Configuration below configs/vision and options over it, by dataset and system."""

SVM = "SVM"


class Clock(Callback):
    """Processor seconds of a training, and those of a step after the first ones."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.began = self.warm = time.process_time()

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == WARM_STEPS:
            self.warm = time.process_time()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.seconds = time.process_time() - self.began
        self.pace = (time.process_time() - self.warm) / max(1, trainer.global_step - WARM_STEPS)


def trained(config: str, options: Mapping[str, Any], seed: int, steps: int, folder: Path) -> Clock:
    """Train a configuration for some steps, and return its clock."""
    clock = Clock()
    given = {**options, "seed_everything": seed, "trainer.max_steps": steps, "trainer.max_epochs": -1}
    given |= {"trainer.limit_val_batches": 0, "trainer.enable_progress_bar": False, "model.report": None}
    moesaic.fit(f"configs/vision/{config}.yaml", given, run_dir=folder, overwrite=True, callbacks=[clock])
    return clock


def of_network(config: str, options: Mapping[str, Any], seed: int, seconds: float, work: Path) -> dict[str, float]:
    """Return top-1 of the test after some seconds of training, with steps and the seconds that it took."""
    pace = trained(config, options, seed, PACE_STEPS, work / "pace").pace
    steps = max(1, int(seconds / pace))
    clock = trained(config, options, seed, steps, work / "run")
    tested = moesaic.test(run_dir=work / "run", ckpt_path="last")
    return {"top1": 100 * tested.metrics["test/top1"], "steps": steps, "seconds": round(clock.seconds, 1)}


def of_svm(dataset: str, seed: int, seconds: float) -> dict[str, float]:
    """Return top-1 of an SVM on the most images, 1,000 times a power of 2, that it can use in the seconds."""
    data = VisionData(dataset, val_size=0.1, seed=seed)
    data.prepare_data()
    data.setup("fit")
    data.setup("test")
    (x, y), (x_test, y_test) = (_rows(data.examples(split)) for split in ("train", "test"))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    used, spent, best = 1000, 0.0, {}
    while True:
        chosen, began = order[:used], time.process_time()
        svm = SVC(C=10.0).fit(x[chosen], y[chosen])
        spent = time.process_time() - began
        if best and spent > seconds:
            return best
        best = {"images": len(chosen), "seconds": round(spent, 1), "top1": 100 * float(svm.score(x_test, y_test))}
        if used >= len(x) or 4 * spent > seconds:  # twice the images take about 4 times as long
            return best
        used *= 2


def _rows(images: Any) -> tuple[torch.Tensor, torch.Tensor]:
    pixels, labels, _ = images.__getitems__(range(len(images)))
    return pixels.flatten(1).float() / 255, labels


def table(results: list[dict[str, Any]]) -> str:
    """Return a table of the means, with the deviation of several seeds: a row a system and seconds."""
    lines = ["| dataset | seconds | system | top-1, % | seeds |", "|---|---:|---|---:|---:|"]
    for (dataset, seconds, system), values in grouped(results).items():
        spread = f" (deviation {statistics.stdev(values):.2f})" if len(values) > 1 else ""
        lines.append(f"| {dataset} | {seconds:g} | {system} | {statistics.mean(values):.2f}{spread} | {len(values)} |")
    return "\n".join(lines)


def grouped(results: list[dict[str, Any]]) -> dict[tuple[str, float, str], list[float]]:
    found: dict[tuple[str, float, str], list[float]] = {}
    for one in results:
        found.setdefault((one["dataset"], one["budget"], one["system"]), []).append(one["top1"])
    return dict(sorted(found.items(), key=lambda item: item[0]))


def draw(results: list[dict[str, Any]], dataset: str) -> None:
    means = {key[1:]: statistics.mean(values) for key, values in grouped(results).items() if key[0] == dataset}
    points = tuple(Point(system, seconds, mean) for (seconds, system), mean in means.items())
    lines = {system: [(p.x, p.y) for p in points if p.label == system] for _, system in means}
    curves = tuple(Line(system, *zip(*places, strict=True)) for system, places in lines.items())
    summary = f"Top-1 of {dataset} over processor seconds of training, {len(lines)} systems"
    axes = ("Processor seconds of training", "Top-1 of the test, %")
    chart = ScatterChart("Top-1 after seconds of training", summary, *axes, points, log_x=True, curves=curves)
    save_charts([chart], PICTURE / f"time_to_accuracy_{dataset}.png", f"What a minute buys: {dataset}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", choices=[*SYSTEMS])
    parser.add_argument("--seconds", type=float, nargs="+", default=[20.0, 60.0], help="budgets (20 60)")
    parser.add_argument("--seeds", type=int, default=3, help="seeds a budget (3)")
    parser.add_argument("--systems", nargs="+", help="some of the systems (all)")
    parser.add_argument("--output", type=Path, default=NUMBERS, help=f"JSON ({NUMBERS.relative_to(ROOT)})")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    systems = args.systems or [*SYSTEMS[args.dataset], SVM]
    kept: dict[str, Any] = read_json(args.output) or {"results": []}
    done = {(one["dataset"], one["system"], one["budget"], one["seed"]) for one in kept["results"]}
    for seconds in args.seconds:
        for seed in range(args.seeds):
            for system in systems:
                key = {"dataset": args.dataset, "system": system, "budget": seconds, "seed": seed}
                if tuple(key.values()) in done:
                    continue
                with tempfile.TemporaryDirectory() as work:
                    if system == SVM:
                        score = of_svm(args.dataset, seed, seconds)
                    else:
                        score = of_network(*SYSTEMS[args.dataset][system], seed, seconds, Path(work))
                kept["results"].append({**key, **score, "machine": machine_line()})
                print(json.dumps(kept["results"][-1]), flush=True)
                with replacing(args.output) as file:
                    file.write(json.dumps(kept, indent=1) + "\n")
    print(table(kept["results"]))
    draw(kept["results"], args.dataset)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
