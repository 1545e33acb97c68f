"""Training throughput on Census-Income: rows a second of an MMoE with 8 experts of 16, batches of 1,024, and Adam.

In turn, each round: a bare loop (ready-made batches; forward, loss, backward, step) over our model and, with
``--peers``, over torch-rechub's of the same widths; and what ``moesaic fit`` does, with its data loader, loggers and
Lightning's loop.

    moesaic bench train
    moesaic bench train --peers      # beside torch-rechub, where it is installed
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn

import core
from apps.base.machine import machine_line
from apps.base.quiet import quiet
from apps.bench import load
from apps.recsys.tables.columns.dense import DenseConfig
from apps.recsys.tables.columns.embedding import EmbeddingConfig
from apps.recsys.tables.data import TableData
from apps.recsys.tables.module import MultiTaskRecommender
from apps.recsys.tables.rows.batch import TableBatch
from apps.recsys.tables.tasks import HeadConfig
from apps.train.checkpoint.resume import GeneratorState
from apps.train.step.module import OptimizerConfig
from apps.train.watch.logs import MetricsCSV

rounds = load("_rounds")

PEER = "torch-rechub, bare loop"


def build(data: TableData, norm: str | None, embedding: str) -> MultiTaskRecommender:
    """Return a model with embeddings of 4, standardized numbers, 8 experts of 16, a gate a task and towers of 8."""
    return MultiTaskRecommender(
        features=data.features,
        shared=core.MMoE(num_experts=8, expert=core.MLP(hidden_dims=(16,), norm=norm)),
        embedding=EmbeddingConfig(kind=embedding, dim=4),
        dense=DenseConfig(kind="normalize"),
        head=HeadConfig(hidden_dims=(8,)),
        optimizer=OptimizerConfig(lr=1e-3, weight_decay=0.0, warmup_steps=0.0, schedule="constant", fused=True),
        report=None,
    )


def bare_loop(model: MultiTaskRecommender, batches: list[TableBatch]) -> Callable[[], float]:
    """Return a function that makes one pass over ``batches`` and gives its seconds."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    model.train()

    def run() -> float:
        start = time.perf_counter()
        for batch in batches:
            loss = model.task_loss(batch).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return time.perf_counter() - start

    return run


class _Window(Callback):
    """The callback measures the seconds from the end of step ``skip`` to the end of the last one."""

    def __init__(self, skip: int) -> None:
        self.skip, self.seconds = skip, 0.0

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == self.skip:
            self._start = time.perf_counter()
        self.seconds = time.perf_counter() - self._start if trainer.global_step > self.skip else 0.0


def lightning_loop(model: MultiTaskRecommender, data: TableData, steps: int) -> Callable[[], float]:
    """Return a function that gives the seconds of ``steps`` steps of ``moesaic fit``; validation is left out."""

    def run() -> float:
        window = _Window(skip=10)
        with tempfile.TemporaryDirectory() as folder, quiet(own_notes=False):
            trainer = Trainer(
                max_steps=10 + steps,
                limit_val_batches=0,
                accelerator="cpu",
                log_every_n_steps=50,
                logger=[MetricsCSV(folder), TensorBoardLogger(folder, name="", version="")],
                callbacks=[window, GeneratorState()],
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                default_root_dir=folder,
            )
            trainer.fit(model, datamodule=data)
        return window.seconds

    return run


def rechub_loop(data: TableData, batches: list[TableBatch]) -> Callable[[], float]:
    """Return a function that gives the seconds of the same pass over torch-rechub's MMoE, on batches in its form."""
    from torch_rechub.basic.features import DenseFeature, SparseFeature
    from torch_rechub.models.multi_task import MMOE

    f = data.features
    columns = [DenseFeature(c.name) for c in f.continuous]
    columns += [SparseFeature(c.name, vocab_size=c.num_rows, embed_dim=4) for c in f.categorical]
    tower = {"dims": [8]}
    model = MMOE(columns, ["classification"] * len(f.tasks), 8, {"dims": [16]}, [tower] * len(f.tasks))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    criterion = nn.BCELoss()
    mean = torch.tensor([c.mean for c in f.continuous])
    std = torch.tensor([c.std for c in f.continuous])
    made: list[tuple[dict[str, Tensor], Tensor]] = []
    for batch in batches:
        x = dict(zip((c.name for c in f.continuous), ((batch.dense_BC - mean) / std).unbind(1), strict=True))
        x |= {c.name: own_B for c, own_B in zip(f.categorical, batch.single_FB, strict=True)}
        made.append((x, batch.label_Bt))
    model.train()

    def run() -> float:
        start = time.perf_counter()
        for x, label_Bt in made:
            y_Bt = model(x)
            loss = sum(criterion(y_Bt[:, t], label_Bt[:, t]) for t in range(len(f.tasks)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return time.perf_counter() - start

    return run


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="train", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--batch_size", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=150, help="steps of each system in a round")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds, after one warm-up")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads")
    parser.add_argument("--norm", choices=["batch", "layer"], help="the experts' norm; torch-rechub's: batch")
    parser.add_argument("--embedding", choices=["joined", "collection", "fused"], default="joined")
    parser.add_argument("--peers", action="store_true", help="also time torch-rechub, if it is installed")
    parser.add_argument("--root", help="a folder with Census-Income; default: the cache, or fetched")
    parser.add_argument("--json", type=Path, help="write all rows to this file too")
    args = parser.parse_args(argv)
    for name in ("batch_size", "steps", "rounds"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)} is not at least 1")
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    data = TableData("census_income", root=args.root, batch_size=args.batch_size, drop_last=True, seed=0)
    data.prepare_data()
    data.setup()
    batches = list(itertools.islice(data.train_dataloader(), args.steps))
    loops = {
        "moesaic, bare loop": bare_loop(build(data, args.norm, args.embedding), batches),
        "moesaic fit": lightning_loop(build(data, args.norm, args.embedding), data, len(batches)),
    }
    if args.peers:
        try:
            loops[PEER] = rechub_loop(data, batches)
        except ImportError as error:
            print(f"torch-rechub is left out: {error}")
    thousands = len(batches) * args.batch_size / 1e3
    print(machine_line())
    print("| system | thousand rows/s (quartiles) | over torch-rechub |\n|---|---|---|")
    rows = []
    for name, (low, mid, high), ratio in rounds.rates(rounds.in_turn(loops, args.rounds), thousands, PEER):
        shown = "" if ratio is None else f"{ratio:.2f}x"
        print(f"| {name} | {mid:.0f} ({low:.0f}-{high:.0f}) | {shown} |")
        rows.append({"system": name, "thousand_rows_per_second": mid, "quartiles": [low, high], "ratio": ratio})
    if args.json:
        args.json.write_text(json.dumps({"machine": machine_line(), "rows": rows}, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
