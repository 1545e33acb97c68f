"""Time, memory, balance and drop rate of every router, in one run.

Each router of ``configs/routing`` decides in an MoE layer, forward and backward, against a plain top-k layer that
computes as many pairs; every round times each once, in turn, and the ratio is taken within the round. Balance and drop
rate are those of untrained routers, on normal tokens and on tokens of a few clusters whose sizes fall as 1 / rank.

    moesaic bench routing                                # the table of benchmarks/README.md
    moesaic bench routing --routers hash base --rounds 20
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import core
from apps.base.machine import machine_line
from apps.equal_cost import routers
from apps.report.routed import gate_weights
from core.memory import kept_bytes

NONE = "–"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Shape:
    """B sequences of S tokens of width D through E experts of width F."""

    B: int = 16
    S: int = 256
    D: int = 512
    E: int = 16
    F: int = 2048

    def __str__(self) -> str:
        return f"T={self.B * self.S} in {self.B} sequences, D={self.D}, E={self.E}, F={self.F}"


def tokens(shape: Shape, skewed: bool) -> tuple[Tensor, Tensor]:
    """Draw (B, S, D) tokens and their ids (B, S).

    They are normal and uniform, or come from 16 clusters whose sizes fall as 1 / rank.
    """
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(shape.B, shape.S, shape.D, generator=generator)
    if not skewed:
        return x.to(DEVICE), torch.randint(0, 1024, (shape.B, shape.S), generator=generator).to(DEVICE)
    size = 1 / torch.arange(1, 17, dtype=torch.float32)
    cluster = torch.multinomial(size, shape.B * shape.S, True, generator=generator).view(shape.B, shape.S)
    center = torch.randn(16, shape.D, generator=generator)
    return (center[cluster] + 0.3 * x).to(DEVICE), cluster.to(DEVICE)


def context(config: Any, ids_BS: Tensor) -> core.RoutingContext:
    """Return the facts that a router may need; sequences take tasks and domains in turn."""
    place_B = torch.arange(ids_BS.shape[0], device=ids_BS.device)
    return core.RoutingContext(
        token_ids_BS=ids_BS,
        task_ids_B=place_B % getattr(config, "num_tasks", 4),
        domain_ids_B=place_B % getattr(config, "num_domains", 4),
        modality_BS=ids_BS % 2,
    )


def configure(router: str | core.RouterConfig, shape: Shape) -> core.MoEConfig:
    """Return the layer with a router by name, or with a plain one."""
    plain = core.MoEConfig(shape.E, core.TokenChoice(top_k=2), core.FFN(hidden_dim=shape.F))
    if not isinstance(router, str):
        return dataclasses.replace(plain, router=router)
    config = routers.with_router(dataclasses.replace(plain, num_experts=8), router)
    return dataclasses.replace(config, num_experts=shape.E, router=at_size(config.router, shape))


def at_size(router: Any, shape: Shape) -> Any:
    """Change the settings of an overlay for 8 experts and short sequences to those of ``shape``, with equal pairs."""
    if isinstance(router, core.Domain):
        return dataclasses.replace(router, num_domains=shape.E)
    if isinstance(router, core.NullExperts):
        return dataclasses.replace(router, num_null_experts=shape.E)
    if isinstance(router, core.SoftSlots):
        return dataclasses.replace(router, slots_per_expert=max(1, 2 * shape.S // shape.E))
    if isinstance(router, core.Merge) and router.segment_length is not None:
        return dataclasses.replace(router, segment_length=max(1, shape.S // 4))
    return router


def step(config: core.MoEConfig, shape: Shape, x: Tensor, ids_BS: Tensor) -> tuple[core.MoELayer, Callable[[], None]]:
    torch.manual_seed(0)
    layer = config.build(shape.D).to(DEVICE)
    x = x.clone().requires_grad_()
    dy, known = torch.randn_like(x), context(config.router, ids_BS)

    def run() -> None:
        x.grad = None
        layer.zero_grad(set_to_none=True)
        layer(x, known).backward(dy)
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    return layer, run


@torch.no_grad()
def usage(config: core.MoEConfig, shape: Shape, skewed: bool) -> tuple[float, float | None]:
    """Return the load imbalance in training and the drop rate at a capacity factor of 1.25, None without a capacity."""
    x, ids_BS = tokens(shape, skewed)

    def stats(changed: core.MoEConfig) -> core.LayerStats:
        torch.manual_seed(0)
        layer = changed.build(shape.D).to(DEVICE)
        with core.record(layer) as tape:
            layer(x, context(changed.router, ids_BS))
        return core.RoutingStats.from_tape(tape).layers[""]

    # The experts do not matter here.
    small = dataclasses.replace(config, expert=core.FFN(hidden_dim=8))
    try:
        limited = dataclasses.replace(small, capacity_factor=1.25)
    except ValueError:
        return stats(small).load_imbalance, None
    return stats(small).load_imbalance, stats(limited).drop_rate


def rows_per_token(config: core.MoEConfig, shape: Shape) -> float:
    """Return the number of the experts' rows for each token."""
    by_sequence = config.capacity().group == "sequence"
    return config.router.rows_per_token(shape.E, shape.S if by_sequence else None)


def measure(names: list[str], shape: Shape, rounds: int) -> list[dict[str, Any]]:
    x, ids_BS = tokens(shape, False)
    configs = {name: configure(name, shape) for name in names}
    pairs = {n: rows_per_token(c, shape) for n, c in configs.items()}
    ks = sorted({min(max(round(p), 1), shape.E) for p in pairs.values()})
    plain = {k: f"plain top-{k}" for k in ks}
    configs |= {plain[k]: configure(core.TokenChoice(top_k=k), shape) for k in ks}
    layers: dict[str, core.MoELayer] = {}
    seconds: dict[str, list[float]] = {name: [] for name in configs}
    # One layer of each K is held, and the routers' one by one: all at once would not fit a laptop's memory.
    runs = {}
    for k in ks:
        layers[plain[k]], runs[plain[k]] = step(configs[plain[k]], shape, x, ids_BS)
        runs[plain[k]]()
    rows = []
    for name in [*plain.values(), *names]:
        k = int(name.rpartition("-")[2]) if name in plain.values() else min(max(round(pairs[name]), 1), shape.E)
        reference, ratios = runs[plain[k]], []
        if name not in layers:
            layers[name], runs[name] = step(configs[name], shape, x, ids_BS)
            runs[name]()
        for _ in range(rounds):
            began = time.perf_counter()
            reference()
            middle = time.perf_counter()
            runs[name]()
            ended = time.perf_counter()
            seconds[name].append(ended - middle)
            ratios.append((ended - middle) / (middle - began))
        quarter = statistics.quantiles(ratios, n=4) if rounds > 1 else ratios * 3
        known = context(configs[name].router, ids_BS)
        even, skewed = (usage(configs[name], shape, s) for s in (False, True))
        rows.append(
            {
                "router": name,
                "pairs_per_token": pairs.get(name, float(k)),
                "against": plain[k],
                "ms": statistics.median(seconds[name]) * 1e3,
                "ratio": quarter[1],
                "ratio_quartiles": [quarter[0], quarter[2]],
                "kept_mb": kept_bytes(layers[name], x, known) / 1e6,
                "imbalance": even[0],
                "imbalance_skewed": skewed[0],
                "drop_rate": even[1],
                "drop_rate_skewed": skewed[1],
            }
        )
        print(line(rows[-1]), flush=True)
        if name in names:
            del layers[name], runs[name]
            gc.collect()
    return rows


@torch.no_grad()
def gates(config: core.MoEConfig, shape: Shape, training: bool) -> Tensor:
    """Return the weight of each expert in each token, (T, E), on the tokens of clusters."""
    x, ids_BS = tokens(shape, True)
    torch.manual_seed(0)
    layer = config.build(shape.D).to(DEVICE).train(training)
    with core.record(layer) as tape:
        layer(x, context(config.router, ids_BS))
    return gate_weights(tape.entries[0].routing)


def draw(names: list[str], folder: Path) -> None:
    """Draw for each router which expert computes which token, in two sequences of 16 tokens of up to 16 clusters."""
    from apps.report.page import HeatmapChart, save_charts

    shape = Shape(B=2, S=16, D=32, E=8, F=8)
    for name in names:
        config = configure(name, shape)
        shown = {
            "training": gates(config, shape, True).cpu().numpy(),
            "evaluation": gates(config, shape, False).cpu().numpy(),
        }
        experts = tuple(f"expert {e}" for e in range(shape.E))
        title = f"{Path(name).stem}, untrained"
        how = {"row_title": "expert", "column_title": "token", "value_title": "weight, %"}
        maps = [HeatmapChart.of(w.T, experts, title=f"{title}, {mode}", **how) for mode, w in shown.items()]
        print(save_charts(maps, folder / f"{Path(name).stem}.png", title))


HEAD = (
    "| router | pairs a token | ms | time over plain top-k (quartiles) | kept, MB | imbalance | skewed | dropped, % | "
    "skewed |\n|---|---|---|---|---|---|---|---|---|"
)


def line(row: dict[str, Any]) -> str:
    def percent(value: float | None) -> str:
        return NONE if value is None else f"{100 * value:.1f}"

    low, high = row["ratio_quartiles"]
    cells = [
        row["router"],
        f"{row['pairs_per_token']:.3g}",
        f"{row['ms']:.0f}",
        f"{row['ratio']:.2f}x ({low:.2f}-{high:.2f})",
        f"{row['kept_mb']:.0f}",
        f"{row['imbalance']:.2f}",
        f"{row['imbalance_skewed']:.2f}",
        percent(row["drop_rate"]),
        percent(row["drop_rate_skewed"]),
    ]
    return f"| {' | '.join(cells)} |"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="routing", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--routers", nargs="+", default=["all"], help="names of configs/routing, files, or all")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds of each router, after one warm-up")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads")
    parser.add_argument("--small", action="store_true", help="a shape of a second, to see that it runs")
    parser.add_argument("--pictures", type=Path, metavar="DIR", help="draw who computes whom instead, one PNG a router")
    parser.add_argument("--json", type=Path, help="write all rows to this file too")
    args = parser.parse_args(argv)
    if args.rounds < 1:
        parser.error(f"--rounds {args.rounds} is not at least 1")
    try:
        names = list(routers.resolve(args.routers))
    except ValueError as error:
        parser.error(str(error))
    torch.set_num_threads(args.threads)
    if args.pictures:
        draw(names, args.pictures)
        return 0
    shape = Shape(B=2, S=16, D=16, F=16) if args.small else Shape()
    print(f"{shape}, float32, {machine_line()}")
    print(HEAD, flush=True)
    rows = measure(names, shape, args.rounds)
    if args.json:
        args.json.write_text(json.dumps({"shape": dataclasses.asdict(shape), "rows": rows}, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
