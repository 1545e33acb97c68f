"""The price of experts on other ranks: the time of a layer, the share of it that is exchange, and what a rank holds.

    python benchmarks/parallel.py
    python benchmarks/parallel.py --ranks 2 4 8 --tokens 8192 --dim 1024

On this machine's processes (gloo): no network is measured, and more ranks than cores slow each other down. Every rank
has tokens of its own. "Local" is the layer whose experts are all on each rank, on the same tokens, on as many ranks at
once. A time is the median over rounds of the slowest rank, forward and backward.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

import core
from apps.base.machine import machine_line
from core.parallel import expert_mesh, experts_part, local_part, shard_experts
from core.parallel.routes import Hop


@dataclass(frozen=True)
class Setting:
    """The layer and its tokens on each rank."""

    dim: int
    hidden: int
    experts: int
    top_k: int
    tokens: int
    rounds: int
    capacity: float

    def layer(self, capacity: float | None = None) -> core.MoE:
        torch.manual_seed(0)
        router = core.TokenChoice(self.top_k)
        return core.MoEConfig(self.experts, router, core.FFN(self.hidden), capacity_factor=capacity).build(self.dim)


def slowest(work: Callable[[], object], rounds: int) -> float:
    """Return the median over rounds of the seconds that the slowest rank takes."""
    times = []
    for i in range(rounds + 1):
        dist.barrier()
        start = time.perf_counter()
        work()
        seconds = torch.tensor(time.perf_counter() - start)
        dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
        times += [float(seconds)] if i else []  # the first round warms up
    return statistics.median(times)


def exchange(hops: list[Hop], x_RD: Tensor) -> None:
    """Send rows there and back, and their gradients too."""
    there = x_RD
    for hop in hops:
        there = hop.there(there)
    back = there * 1
    for hop in reversed(hops):
        back = hop.back(back)
    back.sum().backward()


def measure(setting: Setting, world: int) -> list[dict[str, object]]:
    """Return a row of the table for each layer."""
    x = torch.randn(1, setting.tokens, setting.dim, generator=torch.Generator().manual_seed(dist.get_rank()))

    def step(layer: core.MoE) -> None:
        layer(x.clone().requires_grad_()).sum().backward()

    part, rows = experts_part(expert_mesh(world)), []
    assert part is not None
    for name, capacity, static in (
        ("local", None, False),
        ("dropless", None, False),
        (f"static, capacity {setting.capacity:g}", setting.capacity, True),
    ):
        layer, share = setting.layer(capacity), 0.0
        if name != "local":
            shard_experts(layer, part, static=static)
        seconds = slowest(lambda layer=layer: step(layer), setting.rounds)
        if name != "local":
            routing = layer.router(x)
            rows_here = layer.dispatcher.dispatch(x[0], routing)
            hops = rows_here.plan.way.hops
            sent = torch.randn(hops[0].num_rows, setting.dim, requires_grad=True)
            share = slowest(lambda hops=hops, sent=sent: exchange(hops, sent), setting.rounds) / seconds
        held = sum(local_part(p).numel() * p.element_size() for p in layer.experts.parameters())
        rows.append({"name": name, "seconds": seconds, "share": share, "held": held})
    return rows


def worker(rank: int, world: int, setting: Setting, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", world), rank=rank, world_size=world)
    rows = measure(setting, world)
    if rank == 0:
        torch.save(rows, f"{folder}/rows.pt")
    dist.destroy_process_group()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", nargs="+", type=int, default=[2, 4])
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--top_k", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=1024, help="of each rank")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--capacity", type=float, default=1.25, help="capacity factor of the static exchange")
    options = vars(parser.parse_args(argv))
    ranks = options.pop("ranks")
    setting = Setting(**options)
    print(machine_line())
    print(", ".join(f"{key} {value}" for key, value in asdict(setting).items()))
    print("| ranks | layer | ms | x local | of it exchange | experts on a rank |\n|---|---|---|---|---|---|")
    multiprocessing.set_forkserver_preload(["torch.distributed", "core.parallel"])
    for world in ranks:
        with tempfile.TemporaryDirectory() as folder:
            mp.start_processes(worker, args=(world, setting, folder), nprocs=world, start_method="forkserver")
            rows = torch.load(Path(folder, "rows.pt"), weights_only=True)
        for row in rows:
            times = f"{1000 * row['seconds']:.1f} | {row['seconds'] / rows[0]['seconds']:.2f}"
            share = f"{100 * row['share']:.0f} %" if row["share"] else "–"
            print(f"| {world} | {row['name']} | {times} | {share} | {row['held'] / 2**20:.2f} MiB |")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
