"""Parameters, FLOPs, time and memory of every kind of experts at equal active FLOPs, in one run.

Each kind is as wide as makes a token cost what it costs in the layer of ``FFN`` experts. A step is forward and
backward, to the tokens as well; every round times the FFN layer and then the kind, and the ratio is taken within the
round.

    moesaic bench experts --rounds 9      # the table of docs/results/experts.md
    moesaic bench experts --kinds swiglu lora
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
from pathlib import Path
from typing import Any

import torch
from torch import nn

import core
from apps.base.machine import machine_line
from core.convert import nearest_width
from core.memory import kept_bytes


@dataclasses.dataclass(frozen=True)
class Shape:
    """B sequences of S tokens of width D; F is the width of the FFN experts, of which there are 8, 2 a token."""

    B: int = 16
    S: int = 256
    D: int = 512
    F: int = 1024

    def __str__(self) -> str:
        return f"T={self.B * self.S} in {self.B} sequences, D={self.D}, 8 FFN experts of F={self.F}, 2 a token"


def _beside(expert: core.ExpertConfig, width: int, router: core.RouterConfig = core.TokenChoice(2)) -> core.MoEConfig:
    """Return experts of no hidden dim beside an FFN that every token takes."""
    return core.MoEConfig(8, router, expert, num_shared_experts=1, shared_expert=core.FFN(width))


def _layer(expert: core.ExpertConfig, num_experts: int = 8, top_k: int = 2, **options: Any) -> core.MoEConfig:
    return core.MoEConfig(num_experts, core.TokenChoice(top_k), expert, **options)


FFN = "ffn"
KINDS: dict[str, Callable[[int], core.MoEConfig]] = {
    FFN: lambda width: _layer(core.FFN(width)),
    "swiglu": lambda width: _layer(core.SwiGLU(width)),
    "geglu": lambda width: _layer(core.GEGLU(width)),
    "clamped_swiglu": lambda width: _layer(core.ClampedSwiGLU(width)),
    "fine_grained": lambda width: _layer(core.FFN(4 * width), granularity=4),
    "residual": lambda width: _layer(core.FFN(width), top_k=1, num_shared_experts=1, shared_gate="mix"),
    "two_widths": lambda width: _layer(core.Mixed((core.FFN(2 * width), core.FFN(width)), (4, 4))),
    "zero_copy_constant": lambda width: _layer(
        core.Mixed((core.FFN(width), core.Zero(), core.Identity(), core.Constant(mix=True)), (8, 1, 1, 2)), 12
    ),
    "lora_of_rank_8": lambda width: _beside(core.LoRA(8), width),
    "ia3": lambda width: _beside(core.IA3(), width),
    "peer": lambda width: core.MoEConfig(
        128**2, core.ProductKeys(top_k=width, heads=8, query_dim=256), core.PEER(row_sparse=True)
    ),
    "convolution": lambda width: core.MoEConfig(8, core.ExpertChoice(capacity_factor=2.0), core.Convolution(width)),
    "attention": lambda width: _layer(core.AttentionExperts(head_dim=width, heads_per_expert=2)),
}
"""The layer of each kind at a width."""


def at_equal_flops(kind: str, shape: Shape) -> core.MoEConfig:
    """Return the layer of a kind at the width at which a token costs as in the layer of FFN experts."""

    def cost(config: core.MoEConfig) -> int:
        return config.flops_per_token(shape.D, tokens_per_sequence=shape.S)

    return KINDS[kind](nearest_width(lambda width: cost(KINDS[kind](width)), cost(KINDS[FFN](shape.F))))


def dense_of(shape: Shape) -> core.DenseFFN:
    """Return the dense FFN of as many FLOPs, but for the router's."""
    return core.DenseFFN(2 * shape.F)


def step(layer: nn.Module, shape: Shape) -> Callable[[], None]:
    """Return a forward and backward of the layer."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(shape.B, shape.S, shape.D, generator=generator, requires_grad=True)
    dy = torch.randn(x.shape, generator=generator)

    def run() -> None:
        x.grad = None
        layer.zero_grad(set_to_none=True)
        layer(x).backward(dy)

    return run


def measure(kinds: list[str], shape: Shape, rounds: int) -> list[dict[str, Any]]:
    """Return a row for the dense FFN and each kind, and print it."""

    def built(make: Callable[[], nn.Module]) -> tuple[nn.Module, Callable[[], None]]:
        torch.manual_seed(0)
        layer = make()
        run = step(layer, shape)
        run()
        return layer, run

    reference = built(lambda: at_equal_flops(FFN, shape).build(shape.D))[1]
    rows = []
    for kind in ["dense", *kinds]:
        config = dense_of(shape) if kind == "dense" else at_equal_flops(kind, shape)
        layer, run = built(lambda config=config: config.build(shape.D))  # type: ignore[misc]
        seconds, ratios = [], []
        for _ in range(rounds):
            began = time.perf_counter()
            reference()
            middle = time.perf_counter()
            run()
            ended = time.perf_counter()
            seconds.append(ended - middle)
            ratios.append((ended - middle) / (middle - began))
        quarter = statistics.quantiles(ratios, n=4) if rounds > 1 else ratios * 3
        length = {} if isinstance(config, core.DenseFFN) else {"tokens_per_sequence": shape.S}
        active = config.num_params(shape.D) if isinstance(config, core.DenseFFN) else config.active_params(shape.D)
        rows.append(
            {
                "kind": kind,
                "num_params": config.num_params(shape.D),
                "active_params": active,
                "flops_per_token": config.flops_per_token(shape.D, **length),
                "ms": statistics.median(seconds) * 1e3,
                "ratio": quarter[1],
                "ratio_quartiles": [quarter[0], quarter[2]],
                "kept_mb": kept_bytes(layer, torch.randn(shape.B, shape.S, shape.D, requires_grad=True)) / 1e6,
                "config": repr(config),
            }
        )
        print(line(rows[-1]), flush=True)
        del layer, run
        gc.collect()
    return rows


COLUMNS = ("experts", "parameters, M", "active, M", "MFLOPs a token", "ms a step", "time over FFN experts", "kept, MB")
HEAD = f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|"


def line(row: dict[str, Any]) -> str:
    low, high = row["ratio_quartiles"]
    cells = [
        row["kind"].replace("_", " "),
        f"{row['num_params'] / 1e6:.2f}",
        f"{row['active_params'] / 1e6:.2f}",
        f"{row['flops_per_token'] / 1e6:.2f}",
        f"{row['ms']:.0f}",
        f"{row['ratio']:.2f}x ({low:.2f}-{high:.2f})",
        f"{row['kept_mb']:.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="experts", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=list(KINDS), metavar="KIND")
    parser.add_argument("--rounds", type=int, default=9, help="timed rounds of each kind, after one warm-up")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads")
    parser.add_argument("--small", action="store_true", help="a shape of a second, to see that it runs")
    parser.add_argument("--json", type=Path, help="write all rows to this file too")
    args = parser.parse_args(argv)
    if args.rounds < 1:
        parser.error(f"--rounds {args.rounds} is not at least 1")
    torch.set_num_threads(args.threads)
    shape = Shape(B=2, S=16, D=128, F=256) if args.small else Shape()
    print(f"{shape}, float32, {machine_line()}")
    print(HEAD, flush=True)
    rows = measure(args.kinds, shape, args.rounds)
    if args.json:
        about = {"shape": dataclasses.asdict(shape), "machine": machine_line(), "rounds": args.rounds}
        args.json.write_text(json.dumps({**about, "rows": rows}, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
