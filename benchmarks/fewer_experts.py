"""Accuracy of an image classifier with fewer experts, or none, before and after a little training.

    for s in 0 1; do
        moesaic fit --config configs/vision/digits.yaml --seed_everything $s --run_dir runs/digits/$s
    done
    python benchmarks/fewer_experts.py runs/digits/0 runs/digits/1

This prints the table of ``docs/results/experts.md``. Each run's best checkpoint is converted in each way by itself.
Statistics are of one pass over the training images, without augmentation; scores are those of the test images. Each
converted model is then trained on for a few epochs with AdamW.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn

import core
from apps.base.machine import machine_line
from apps.vision.data import VisionData
from apps.vision.module import VisionClassifier

Statistics = dict[str, core.ExpertStatistics]
Conversion = Callable[[nn.Module, Statistics], object]

SCORES = ("use", "reap", "man", "msan", "spread")
HOWS = ("average", "use", "most_used", "sum", "top_k", "svd")


def loads(statistics: Statistics) -> dict[str, torch.Tensor]:
    return {name: own.loads_E for name, own in statistics.items()}


def conversions(shares: list[float]) -> Iterator[tuple[str, Conversion]]:
    """Yield each conversion with its name."""
    yield "as trained", lambda model, statistics: model
    for share in shares:
        kept = f"{100 * share:g} % of the experts"
        for by in SCORES:
            yield f"{kept}, by {by}", lambda model, s, share=share, by=by: core.prune_experts(model, s, share, by)
        yield (
            f"{kept}, constants for the others, by spread",
            lambda model, s, share=share: core.prune_experts(model, s, share, "spread", constants=True),
        )
        yield f"{kept}, merged", lambda model, s, share=share: core.merge_experts(model, s, share)
    for how in HOWS:
        yield (
            f"dense, {how}",
            lambda model, s, how=how: core.densify(model, how, loads(s) if how in ("use", "most_used") else None),
        )


@torch.inference_mode()
def top1(model: VisionClassifier, data: VisionData) -> float:
    """Return the share of the test images whose best class is the true one, in percent."""
    right = [model(batch.image).argmax(-1) == batch.label for batch in data.test_dataloader()]
    return 100 * float(torch.cat(right).double().mean())


def tune(model: VisionClassifier, data: VisionData, epochs: int, lr: float) -> None:
    """Train a model on for a few epochs, at a constant rate, with the balance losses of the layers that are left."""
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    model.train()
    for _ in range(epochs):
        for batch in data.train_dataloader():
            with core.record(model) as tape:
                loss = nn.functional.cross_entropy(model(batch.image), batch.label)
            optimizer.zero_grad()
            (loss + core.aux_loss(tape)).backward()
            optimizer.step()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs of a vision config")
    parser.add_argument("--dataset", default="digits", help="the dataset that they were trained on")
    parser.add_argument("--shares", nargs="+", type=float, default=[0.5, 0.25], help="shares of the experts to keep")
    parser.add_argument("--epochs", type=int, default=3, help="of training after the conversion")
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate of that training")
    args = parser.parse_args(argv)
    data = VisionData(args.dataset, batch_size=64)
    before: dict[str, list[float]] = {}
    after: dict[str, list[float]] = {}
    params: dict[str, int] = {}
    for run in args.runs:
        model = VisionClassifier.load_from_checkpoint(run / "checkpoints" / "best.ckpt").eval()
        data.setup()
        statistics = core.expert_statistics(
            model, data.train_eval_dataloader(), lambda model, batch: model(batch.image), every_token=True
        )
        for name, convert in conversions(args.shares):
            converted = copy.deepcopy(model)
            convert(converted, statistics)
            params[name] = sum(p.numel() for p in converted.parameters())
            before.setdefault(name, []).append(top1(converted.eval(), data))
            tune(converted, data, args.epochs, args.lr)
            after.setdefault(name, []).append(top1(converted.eval(), data))
    print(machine_line())
    print(f"| model | parameters | test top-1 | after {args.epochs} epochs |\n|---|---|---|---|")
    for name in before:
        print(f"| {name} | {params[name]:,} | {described(before[name])} | {described(after[name])} |")
    return 0


def described(scores: list[float]) -> str:
    """Return the mean of the runs' scores, and each of them."""
    return f"{sum(scores) / len(scores):.1f} ({', '.join(f'{score:.1f}' for score in scores)})"


if __name__ == "__main__":
    raise SystemExit(main())
