"""Sharded tables on the processes of one machine: their memory, the bytes sent in a step, and its time.

    torchrun --standalone --nproc-per-node 2 benchmarks/scale.py
    torchrun --standalone --nproc-per-node 2 benchmarks/scale.py --rows 10000000 --columns 1 --pooling 5

The bytes are counted at the collectives: a process's own part of an exchange does not leave it. The formulas beside
them are those of docs/results/embedding_tables.md. For the resident memory give one of ``--shardings`` a run.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import logging
import os
import platform
import statistics
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningDataModule, Trainer
from torch.utils.data import DataLoader

import core
from apps.recsys.encoding.features import CategoricalFeature, Features
from apps.recsys.tables.batch import Ragged, TableBatch
from apps.recsys.tables.embedding import EmbeddingConfig
from apps.recsys.tables.module import MultiTaskRecommender
from apps.recsys.tables.sharding import tables
from apps.recsys.tables.strategy import TorchRecStrategy
from apps.train.torchrec_rows import is_split

SHARDINGS = ("table_wise", "row_wise", "column_wise")


class Made(LightningDataModule):
    """Batches of uniform ids, ``pooling`` a column and row; each process draws its own."""

    def __init__(self, features: Features, batch_size: int, pooling: int, steps: int) -> None:
        super().__init__()
        self.features, self.batch_size, self.pooling, self.steps = features, batch_size, pooling, steps

    def train_dataloader(self) -> DataLoader[Any]:
        g = torch.Generator().manual_seed(dist.get_rank())
        B, L = self.batch_size, self.pooling
        batches = []
        for _ in range(self.steps):
            ids = [torch.randint(1, f.num_rows, (B * L,), generator=g) for f in self.features.categorical]
            lists = tuple(Ragged(own, torch.full((B,), L, dtype=torch.int32)) for own in ids if L > 1)
            label_Bt = (torch.rand(B, 2, generator=g) < 0.3).float()
            single_FB = torch.stack(ids) if L == 1 else torch.zeros(0, B, dtype=torch.int64)
            batches.append(TableBatch(torch.zeros(B, 0), single_FB, label_Bt, torch.arange(B), lists=lists))
        return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]


class Steps(Callback):
    """The callback measures the seconds of each step after the first, and the bytes that its collectives send."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.sent: Counter[str] = Counter()
        self.local_bytes = 0

    def on_train_batch_start(self, trainer: Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 1:
            self.sent.clear()
            self.local_bytes = sum(
                part.tensor.numel() * part.tensor.element_size()
                for value in tables(module).values()
                if is_split(value)
                for part in value.local_shards()
            )
        self._start = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx:
            self.seconds.append(time.perf_counter() - self._start)


@contextlib.contextmanager
def counted(sent: Counter[str]) -> Iterator[None]:
    """Count the bytes that this process sends in the collectives of TorchRec."""

    def size(t: torch.Tensor) -> int:
        return t.numel() * t.element_size()

    def all_to_all(name: str, original: Any) -> Any:
        def call(output: torch.Tensor, input: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            splits = kwargs.get("input_split_sizes", args[1] if len(args) > 1 else None)
            group = kwargs.get("group")
            W, rank = dist.get_world_size(group), dist.get_rank(group)
            own = splits[rank] / max(sum(splits), 1) if splits else 1 / W
            kind = "ids" if input.dtype in (torch.int32, torch.int64) else "rows and gradients"
            sent[kind] += round(size(input) * (1 - own))
            return original(output, input, *args, **kwargs)

        return call

    def reduce_scatter(name: str, original: Any) -> Any:
        def call(output: torch.Tensor, input: Any, *args: Any, **kwargs: Any) -> Any:
            whole = size(input) if isinstance(input, torch.Tensor) else sum(map(size, input))
            sent["rows and gradients"] += round(whole * (1 - 1 / dist.get_world_size(kwargs.get("group"))))
            return original(output, input, *args, **kwargs)

        return call

    def all_gather(name: str, original: Any) -> Any:
        def call(output: Any, input: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            sent["rows and gradients"] += size(input) * (dist.get_world_size(kwargs.get("group")) - 1)
            return original(output, input, *args, **kwargs)

        return call

    wrappers = {
        "all_to_all_single": all_to_all,
        "reduce_scatter_tensor": reduce_scatter,
        "reduce_scatter": reduce_scatter,
        "all_gather_into_tensor": all_gather,
    }
    with contextlib.ExitStack() as stack:
        for name, wrap in wrappers.items():
            stack.enter_context(mock.patch.object(dist, name, wrap(name, getattr(dist, name))))
        yield


def expected(sharding: str, W: int, B: int, F: int, L: int, D: int) -> tuple[float, float]:
    """Return the bytes of ids and lengths, and of rows and gradients, that a process sends, by the page's formulas."""
    away = (W - 1) / W
    if sharding == "row_wise":  # a length for each process; sums of each process for each example
        return (8 * B * F * L + 4 * B * F * W) * away, 2 * 4 * B * F * D * (W - 1)
    if sharding == "table_row_wise":  # over the G processes of a node; the tables evenly over n nodes
        G = int(os.environ["LOCAL_WORLD_SIZE"])
        n = W // G
        return (8 * B * F * L + 4 * B * F * G) * away, 2 * 4 * B * F * D * (G - 1 + (n - 1) / n)
    shards = min(W, D // 4) if sharding == "column_wise" else 1
    return (8 * L + 4) * B * F * shards * away, 2 * 4 * B * F * D * away


def resident() -> float:
    """Return the GB of this process's memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e9


def measure(sharding: str, args: argparse.Namespace) -> dict[str, float]:
    features = Features(
        categorical=tuple(
            CategoricalFeature(f"c{i}", args.rows, multi_valued=args.pooling > 1, hashed=True)
            for i in range(args.columns)
        ),
        tasks=("a", "b"),
        positives=(0.3, 0.3),
    )
    torch.manual_seed(0)
    module = MultiTaskRecommender(
        features,
        core.MMoE(8, core.MLP((16,))),
        EmbeddingConfig("collection", dim=args.dim, deferred=True),
        report=None,
    )
    steps = Steps()
    with tempfile.TemporaryDirectory() as folder, counted(steps.sent):
        trainer = Trainer(
            accelerator="cpu",
            devices=int(os.environ["LOCAL_WORLD_SIZE"]),
            num_nodes=dist.get_world_size() // int(os.environ["LOCAL_WORLD_SIZE"]),
            strategy=TorchRecStrategy(sharding=sharding),  # type: ignore[arg-type]
            default_root_dir=folder,
            max_epochs=1,
            log_every_n_steps=10_000,
            logger=False,
            use_distributed_sampler=False,  # each process draws its own
            callbacks=[steps],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, Made(features, args.batch_size, args.pooling, args.steps + 1))
    measured = {
        "local": steps.local_bytes / 1e6,
        "resident": resident(),
        "ids": steps.sent["ids"] / args.steps,
        "rows": steps.sent["rows and gradients"] / args.steps,
        "ms": 1e3 * statistics.median(steps.seconds),
    }
    del module, trainer
    gc.collect()
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2_500_000, help="rows of each table")
    parser.add_argument("--columns", type=int, default=4)
    parser.add_argument("--dim", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=1024, help="rows of a batch on each process")
    parser.add_argument("--pooling", type=int, default=1, help="ids of a column in a row")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--shardings", nargs="+", default=SHARDINGS)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    # The patched collectives need the group's size: Lightning takes a group that is there.
    dist.init_process_group("gloo")
    W = dist.get_world_size()
    lines = []
    for sharding in args.shardings:
        measured = measure(sharding, args)
        ids, rows = expected(sharding, W, args.batch_size, args.columns, args.pooling, args.dim)
        lines.append(
            f"| {sharding} | {measured['local']:.0f} MB | {measured['resident']:.2f} GB | {measured['ids'] / 1e3:.1f} "
            f"({ids / 1e3:.1f}) kB | {measured['rows'] / 1e3:.1f} ({rows / 1e3:.1f}) kB | {measured['ms']:.1f} ms |"
        )
    if dist.get_rank() == 0:
        print(
            f"{W} processes of one thread, {args.columns} tables of {args.rows:,} x {args.dim}, batch "
            f"{args.batch_size} a process, {args.pooling} ids a column and row; {platform.machine()}, "
            f"torch {torch.__version__}\n"
        )
        print("| sharding | tables | resident | ids and lengths (formula) | vectors and gradients (formula) | step |")
        print("|---|---|---|---|---|---|")
        print("\n".join(lines), flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
