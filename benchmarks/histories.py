"""Training throughput on MovieLens-1M's histories: items a second of HSTU, of width 64 with 2 blocks and 2 heads.

In turn, each round: a bare loop (ready-made batches; forward, loss over all films at every position, backward, AdamW)
over our model and, with ``--peers``, over torch-rechub's of the same widths, on the same histories.

    moesaic bench histories
    moesaic bench histories --peers                       # beside torch-rechub, where it is installed
    moesaic bench histories --peers --dtype float32
"""

from __future__ import annotations

import argparse
import itertools
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apps.base.machine import machine_line
from apps.bench import load
from apps.recsys.sequence.data import HistoryBatch, HistoryData
from apps.recsys.sequence.model import HistoryModelConfig
from apps.recsys.sequence.module import NextItemRecommender

rounds = load("_rounds")

PEER = "torch-rechub"
WIDTH, BLOCKS, HEADS, BUCKETS = 64, 2, 2, 64

Loss = Callable[[HistoryBatch], Tensor]


def ours(data: HistoryData) -> tuple[nn.Module, Loss]:
    """Return our model and its loss."""
    config = HistoryModelConfig(WIDTH, BLOCKS, HEADS, mixing="hstu", time_buckets=BUCKETS)
    model = NextItemRecommender(data.num_items, data.max_length, config, report=None)
    return model, lambda batch: model.task_loss(batch).loss


def rechub(data: HistoryData) -> tuple[nn.Module, Loss]:
    """Return torch-rechub's model and the same loss; its forward gives all logits."""
    from torch_rechub.models.generative.hstu import HSTUModel

    head = WIDTH // HEADS
    model = HSTUModel(data.num_items + 1, WIDTH, HEADS, BLOCKS, head, head, data.max_length, num_time_buckets=BUCKETS)

    def loss(batch: HistoryBatch) -> Tensor:
        assert batch.seconds_BS is not None
        # It reads the seconds up to one moment, such as that of the last item.
        before_BS = (batch.seconds_BS.amax(1, keepdim=True) - batch.seconds_BS) * (batch.items_BS > 0)
        logits_BSV = model(batch.items_BS, before_BS)
        return F.cross_entropy(logits_BSV.flatten(0, 1).float(), batch.targets_BS.flatten(), ignore_index=0)

    return model, loss


def bare_loop(model: nn.Module, loss: Loss, batches: list[HistoryBatch], dtype: torch.dtype) -> Callable[[], float]:
    """Return a function that makes one pass over ``batches`` and gives the processor's seconds.

    They count the work of all threads, and do not grow with what else the machine does.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    model.train()

    def run() -> float:
        start = time.process_time()
        for batch in batches:
            with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                cost = loss(batch)
            optimizer.zero_grad()
            cost.backward()
            optimizer.step()
        return time.process_time() - start

    return run


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="histories", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--max_length", type=int, default=200)
    parser.add_argument("--steps", type=int, default=8, help="steps of each system in a round")
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds, after one warm-up")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16", help="of the products")
    parser.add_argument("--peers", action="store_true", help="also time torch-rechub, if it is installed")
    parser.add_argument("--root", type=Path, help="a folder with MovieLens-1M; default: the cache, or fetched")
    args = parser.parse_args(argv)
    for name in ("batch_size", "max_length", "steps", "rounds"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)} is not at least 1")
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    root = None if args.root is None else str(args.root)
    data = HistoryData(
        "movielens_1m", root, max_length=args.max_length, train_windows="all", batch_size=args.batch_size, seed=0
    )
    data.prepare_data()
    data.setup()
    batches = list(itertools.islice(data.train_dataloader(), args.steps))
    makers = {"moesaic": ours, PEER: rechub} if args.peers else {"moesaic": ours}
    loops = {}
    for name, make in makers.items():
        try:
            loops[name] = bare_loop(*make(data), batches, getattr(torch, args.dtype))
        except ImportError as error:
            print(f"{name} is left out: {error}")
    thousands = sum(int((batch.items_BS > 0).sum()) for batch in batches) / 1e3
    print(machine_line())
    print("| system | thousand items a processor second (quartiles) | over torch-rechub |\n|---|---|---|")
    for name, (low, mid, high), ratio in rounds.rates(rounds.in_turn(loops, args.rounds), thousands, PEER):
        shown = "" if ratio is None else f"{ratio:.2f}x"
        print(f"| {name} | {mid:.1f} ({low:.1f}-{high:.1f}) | {shown} |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
