"""Time of an MoE layer, forward and backward, against a dense FFN of equal active FLOPs, in one run.

Every round times each system once, in turn, and the ratio to the dense FFN is taken within the round, so that a drift
of the machine's speed hits both sides. Printed: the median ratio and its quartiles, over the rounds.

    python benchmarks/layer.py                       # the table of benchmarks/README.md
    python benchmarks/layer.py --dtypes float32 --shapes E8 --rounds 20
    python benchmarks/layer.py --peers               # rows for transformers and st-moe-pytorch, where installed
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import core
from apps.machine import machine_line
from core.memory import kept_bytes


@dataclass(frozen=True)
class Shape:
    """T tokens of width D through E experts of width F, K each."""

    T: int
    D: int
    E: int
    K: int
    F: int

    def __str__(self) -> str:
        return f"T={self.T} D={self.D} E={self.E} K={self.K} F={self.F}"


SHAPES = {
    "E8": Shape(4096, 512, 8, 2, 2048),
    "E32": Shape(4096, 512, 32, 2, 2048),
    "E64": Shape(4096, 512, 64, 8, 256),
    # Equal rows per expert: T grows with E.
    "E64-rows": Shape(32768, 512, 64, 2, 2048),
}


class DenseFFN(nn.Module):
    """The dense layer of equal active FLOPs: hidden width K * F."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden_dim, bias=False), nn.Linear(hidden_dim, dim, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


def moesaic_layer(shape: Shape, backend: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
    config = core.MoEConfig(
        shape.E, core.TokenChoice(top_k=shape.K), core.FFN(hidden_dim=shape.F, activation="gelu"), backend=backend
    )
    return config.build(shape.D).to(device, dtype)


def peer_layers(shape: Shape, device: torch.device, dtype: torch.dtype) -> dict[str, nn.Module]:
    """The layers of installed peers at the same FLOPs; gated ones get two thirds of the width."""
    peers: dict[str, nn.Module] = {}
    try:
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock
    except ImportError:
        pass
    else:
        for implementation in ("grouped_mm", "eager"):
            config = MixtralConfig(
                hidden_size=shape.D,
                intermediate_size=shape.F * 2 // 3 // 16 * 16,
                num_local_experts=shape.E,
                num_experts_per_tok=shape.K,
                experts_implementation=implementation,
            )
            block = MixtralSparseMoeBlock(config)
            for parameter in block.parameters():
                nn.init.normal_(parameter, std=0.02)
            peers[f"transformers Mixtral, {implementation}"] = block.to(device, dtype)
    try:
        from st_moe_pytorch import MoE as StMoE
    except ImportError:
        pass
    else:
        if shape.K == 2:  # its gate is top-2 by default
            moe = StMoE(dim=shape.D, num_experts=shape.E, expert_hidden_mult=shape.F * 2 // 3 / shape.D)
            peers["st-moe-pytorch"] = moe.to(device, dtype)
    return peers


def step(layer: nn.Module, x: torch.Tensor, dy: torch.Tensor) -> Callable[[], None]:
    def run() -> None:
        x.grad = None
        layer.zero_grad(set_to_none=True)
        y = layer(x)
        y = y if isinstance(y, torch.Tensor) else y[0]
        y.backward(dy)
        if x.device.type == "cuda":
            torch.cuda.synchronize()

    return run


def measure(shape: Shape, dtype: torch.dtype, backends: list[str], rounds: int, peers: bool) -> list[dict]:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    x = torch.randn(1, shape.T, shape.D, device=device, dtype=dtype, requires_grad=True)
    dy = torch.randn_like(x)
    layers: dict[str, nn.Module] = {"dense": DenseFFN(shape.D, shape.K * shape.F).to(device, dtype)}
    layers |= {f"moesaic {b}": moesaic_layer(shape, b, device, dtype) for b in backends}
    if peers:
        layers |= peer_layers(shape, device, dtype)
    runs = {name: step(layer, x, dy) for name, layer in layers.items()}
    for name in list(runs):
        try:
            runs[name]()
        except RuntimeError as error:
            if name.startswith(("dense", "moesaic")):
                raise
            print(f"{name} does not run in {dtype}: {str(error).splitlines()[0]}", flush=True)
            del runs[name]
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    rows = []
    for name, times in seconds.items():
        ratios = sorted(t / d for t, d in zip(times, seconds["dense"], strict=True))
        quarter = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
        rows.append(
            {
                "shape": str(shape),
                "dtype": str(dtype).removeprefix("torch."),
                "system": name,
                "ms": statistics.median(times) * 1e3,
                "us_per_token": statistics.median(times) * 1e6 / shape.T,
                "ratio": quarter[1],
                "ratio_quartiles": [quarter[0], quarter[2]],
                "kept_mb": kept_bytes(layers[name], x) / 1e6,
            }
        )
    del layers, runs
    gc.collect()
    return rows


def table(rows: list[dict]) -> str:
    lines = ["| shape | dtype | system | ms | time over dense (quartiles) | kept for backward, MB |"]
    lines.append("|---|---|---|---|---|---|")
    for r in rows:
        low, high = r["ratio_quartiles"]
        ratio = f"{r['ratio']:.2f}x ({low:.2f}-{high:.2f})"
        lines.append(f"| {r['shape']} | {r['dtype']} | {r['system']} | {r['ms']:.0f} | {ratio} | {r['kept_mb']:.0f} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="layer", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--shapes", nargs="+", choices=sorted(SHAPES), default=list(SHAPES))
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--backends", nargs="+", default=["auto"], choices=["auto", "cpu", "grouped", "eager"])
    parser.add_argument("--rounds", type=int, default=11, help="timed rounds of each system, after one warm-up")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads")
    parser.add_argument("--peers", action="store_true", help="also time the installed peers")
    parser.add_argument("--json", type=Path, help="write all rows to this file too")
    args = parser.parse_args(argv)
    if args.rounds < 1:
        parser.error(f"--rounds {args.rounds} is not at least 1")
    torch.set_num_threads(args.threads)
    print(machine_line(), flush=True)
    rows: list[dict] = []
    for dtype in args.dtypes:
        for name in args.shapes:
            # Eight times the tokens: fewer rounds say as much.
            rounds = args.rounds if SHAPES[name].T <= 4096 else max(3, args.rounds // 3)
            new = measure(SHAPES[name], getattr(torch, dtype), args.backends, rounds, args.peers)
            print(table(new) if not rows else "\n".join(table(new).splitlines()[2:]), flush=True)
            rows += new
    for dtype in args.dtypes:
        per_token = {
            r["shape"]: r["us_per_token"] for r in rows if r["dtype"] == dtype and r["system"] == "moesaic auto"
        }
        small, large = (per_token.get(str(SHAPES[s])) for s in ("E8", "E64-rows"))
        if small and large:
            print(f"equal rows per expert, {dtype}: time per token at E=64 over E=8 is {large / small:.2f}x")
    if args.json:
        args.json.write_text(json.dumps({"machine": machine_line(), "rows": rows}, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
