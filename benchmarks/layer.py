"""Time of an MoE layer, forward and backward, against a dense FFN of equal active FLOPs, in one run.

Every round times each system once, in turn, and the ratio to the dense FFN is taken within the round, so that a drift
of the machine's speed hits both sides. Printed: the median ratio and its quartiles, over the rounds. The dense FFN
multiplies by the experts' library (``cpu.Linear``); where that is not torch's own, ``torch.nn.Linear`` has a row too.

The products' rate stands beside that of one large product of the same dtype, measured in the same run; on CUDA the
layers of a model's size run, by Triton, by ``grouped_mm`` with a gather and a scatter of its own, and by the oracle.

    python benchmarks/layer.py                       # the table of benchmarks/README.md
    python benchmarks/layer.py --dtypes float32 --shapes E8 --rounds 20
    python benchmarks/layer.py --peers               # rows for the peers that are installed
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import core
from apps.base.machine import machine_line
from apps.base.progress import each, say
from core.kernels import BACKENDS, cpu
from core.kernels.cpu.products import is_served_badly, mm
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
    # For a GPU: few large experts, and many small ones.
    "large-E8": Shape(32768, 2048, 8, 2, 5632),
    "large-E64": Shape(32768, 2048, 64, 8, 1408),
}
DEFAULTS = {"cpu": ["E8", "E32", "E64", "E64-rows"], "cuda": ["large-E8", "large-E64"]}
GEMMS = ("up", "linear", "hidden_grad", "weight_grad")
"""The Triton kernels that multiply; everything else of a step is routing."""


class DenseFFN(nn.Module):
    """The dense layer of equal active FLOPs: hidden width K * F. Its products are those of the experts' library."""

    def __init__(self, dim: int, hidden_dim: int, gated: bool, linear: type[nn.Linear] = cpu.Linear) -> None:
        super().__init__()
        self.fc1, self.fc2 = linear(dim, hidden_dim, bias=False), linear(hidden_dim, dim, bias=False)
        self.gate = linear(dim, hidden_dim, bias=False) if gated else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.fc1(x)
        return self.fc2(F.gelu(h) if self.gate is None else F.silu(self.gate(x)) * h)


def moesaic_layer(shape: Shape, backend: str, gated: bool, device: torch.device, dtype: torch.dtype) -> nn.Module:
    expert = core.SwiGLU(hidden_dim=shape.F) if gated else core.FFN(hidden_dim=shape.F, activation="gelu")
    return (
        core.MoEConfig(shape.E, core.TokenChoice(top_k=shape.K), expert, backend=backend)
        .build(shape.D)
        .to(device, dtype)
    )


class ScatterMoE(nn.Module):
    """scattermoe's experts behind a linear gate, which the package leaves to its user."""

    def __init__(self, shape: Shape, gated: bool) -> None:
        super().__init__()
        from scattermoe.mlp import GLUMLP, MLP

        self.top_k, self.gate = shape.K, nn.Linear(shape.D, shape.E, bias=False)
        kind, activation = (GLUMLP, nn.SiLU()) if gated else (MLP, nn.GELU())
        self.experts = kind(shape.D, shape.F, shape.E, shape.K, activation=activation)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        best = self.gate(x.flatten(0, 1)).float().softmax(-1).topk(self.top_k, -1)
        gates = best.values / best.values.sum(-1, keepdim=True)
        return self.experts(x.flatten(0, 1), gates.to(x.dtype), best.indices).view_as(x)


@contextlib.contextmanager
def or_named(name: str) -> Iterator[None]:
    """Pass over a peer that is not installed, and name one that cannot be built; the table goes on without it."""
    try:
        yield
    except ImportError:
        pass
    except Exception as error:
        print(f"{name} is not built: {reason(error)}", flush=True)


def reason(error: Exception) -> str:
    """Return the first line of an error's message, with its class."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def gpu_peers(shape: Shape, gated: bool, dtype: torch.dtype) -> dict[str, nn.Module]:
    """Return scattermoe, megablocks and sonic-moe, where they are installed, at the same widths."""
    peers: dict[str, nn.Module] = {}
    with or_named("scattermoe"):
        peers["scattermoe"] = ScatterMoE(shape, gated)
    with or_named("megablocks dMoE"):
        from megablocks import Arguments, dMoE

        peers["megablocks dMoE"] = dMoE(
            Arguments(
                hidden_size=shape.D,
                ffn_hidden_size=shape.F,
                moe_num_experts=shape.E,
                moe_top_k=shape.K,
                mlp_type="glu" if gated else "mlp",
                mlp_impl="grouped",
                bias=False,
                return_bias=False,
                activation_fn=F.silu if gated else F.gelu,
                bf16=dtype == torch.bfloat16,
                fp16=False,
                device=torch.device("cuda"),
            )
        )
    with or_named("sonic-moe"):
        from sonicmoe import MoE as SonicMoE
        from sonicmoe.enums import ActivationType

        peers["sonic-moe"] = SonicMoE(
            num_experts=shape.E,
            num_experts_per_tok=shape.K,
            hidden_size=shape.D,
            intermediate_size=shape.F,
            activation_function=ActivationType.SWIGLU if gated else ActivationType.GELU,
            add_bias=False,
            std=0.02,
        )
    return peers


def peer_layers(shape: Shape, gated: bool, device: torch.device, dtype: torch.dtype) -> dict[str, nn.Module]:
    """Return the layers of installed peers at the same FLOPs.

    Beside experts without a gate, peers that always have one get two thirds of the width.
    """
    peers: dict[str, nn.Module] = {}
    for name, peer in (gpu_peers(shape, gated, dtype) if device.type == "cuda" else {}).items():
        with or_named(name):
            peers[name] = peer.to(device, dtype)
    gated_width = shape.F if gated else shape.F * 2 // 3 // 16 * 16
    with or_named("transformers Mixtral"):
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

        for implementation in ("grouped_mm", "eager"):
            config = MixtralConfig(
                hidden_size=shape.D,
                intermediate_size=gated_width,
                num_local_experts=shape.E,
                num_experts_per_tok=shape.K,
                experts_implementation=implementation,
            )
            block = MixtralSparseMoeBlock(config)
            for parameter in block.parameters():
                nn.init.normal_(parameter, std=0.02)
            peers[f"transformers Mixtral, {implementation}"] = block.to(device, dtype)
    with or_named("st-moe-pytorch"):
        from st_moe_pytorch import MoE as StMoE

        if shape.K == 2:  # its gate is top-2 by default
            moe = StMoE(dim=shape.D, num_experts=shape.E, expert_hidden_mult=gated_width / shape.D)
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


def seconds_of(run: Callable[[], object], device: torch.device, repeats: int = 7) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def ceilings(device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    """Measure the machine's limits: FLOP/s of one large product, and bytes/s read and written by a copy."""
    side, numbers = (8192, 1 << 28) if device.type == "cuda" else (2048, 1 << 24)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    source = torch.empty(numbers, dtype=torch.float32, device=device).fill_(1.0)
    target = torch.empty_like(source)
    flops = 2 * side**3 / seconds_of(lambda: mm(a, b), device)
    return flops, 2 * source.nbytes / seconds_of(lambda: target.copy_(source), device)


def work(shape: Shape, dtype: torch.dtype, gated: bool) -> tuple[int, int]:
    """Return the FLOPs of a step, and the least bytes that a sparse one moves.

    Weights are read twice and their gradients written, tokens and output are moved with their gradients, and
    pre-activations are written and read.
    """
    matrices, rows = 3 if gated else 2, shape.T * shape.K
    weights = shape.E * shape.D * shape.F * matrices
    numbers = 3 * weights + 4 * shape.T * shape.D + 2 * rows * shape.F * (matrices - 1)
    # Forward and backward: three products for each of the forward's.
    return 3 * 2 * rows * shape.D * shape.F * matrices, numbers * dtype.itemsize


def routing_share(run: Callable[[], None]) -> float | None:
    """Return the share of the GPU's time in a step that is not a product of Triton's; None on a CPU."""
    if not torch.cuda.is_available():
        return None
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        run()
    times = {e.key: e.self_device_time_total for e in seen.key_averages()}
    total = sum(times.values())
    products = sum(t for name, t in times.items() if name in GEMMS)
    return 1 - products / total if total and products else None


def measure(
    shape: Shape,
    dtype: torch.dtype,
    backends: list[str],
    rounds: int,
    peers: bool,
    gated: bool,
    device: torch.device,
    top: tuple[float, float],
) -> list[dict]:
    flops, moved = work(shape, dtype, gated)
    torch.manual_seed(0)
    x = torch.randn(1, shape.T, shape.D, device=device, dtype=dtype, requires_grad=True)
    dy = torch.randn_like(x)
    layers: dict[str, nn.Module] = {"dense": DenseFFN(shape.D, shape.K * shape.F, gated).to(device, dtype)}
    if dtype == torch.float32 and device.type == "cpu" and is_served_badly():  # then the two differ
        layers["dense, torch.nn.Linear"] = DenseFFN(shape.D, shape.K * shape.F, gated, nn.Linear)
    layers |= {f"moesaic {b}": moesaic_layer(shape, b, gated, device, dtype) for b in backends}
    if peers:
        layers |= peer_layers(shape, gated, device, dtype)
    runs = {name: step(layer, x, dy) for name, layer in layers.items()}
    for name in list(runs):
        try:
            runs[name]()
        except Exception as error:
            if name.startswith(("dense", "moesaic")):
                raise
            print(f"{name} does not run in {dtype}: {reason(error)}", flush=True)
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
                "tflops": flops / statistics.median(times) / 1e12,
                "of_top_flops": flops / statistics.median(times) / top[0],
                "gb_per_s": moved / statistics.median(times) / 1e9,
                "of_top_bytes": moved / statistics.median(times) / top[1],
                "routing_share": routing_share(runs[name]) if name.startswith("moesaic") else None,
            }
        )
    del layers, runs
    gc.collect()
    return rows


def table(rows: list[dict]) -> str:
    heads = (
        "ms",
        "time over dense (quartiles)",
        "TFLOP/s (of a product's)",
        "GB/s (of a copy's)",
        "kept, MB",
        "routing",
    )
    lines = [f"| shape | dtype | system | {' | '.join(heads)} |", "|---|---|---" + "|---" * len(heads) + "|"]
    for r in rows:
        low, high = r["ratio_quartiles"]
        ratio = f"{r['ratio']:.2f}x ({low:.2f}-{high:.2f})"
        rate = f"{r['tflops']:.3g} ({100 * r['of_top_flops']:.0f} %)"
        rate += f" | {r['gb_per_s']:.3g} ({100 * r['of_top_bytes']:.0f} %)"
        share = "–" if r["routing_share"] is None else f"{100 * r['routing_share']:.1f} %"
        ms = f"{r['ms']:.0f}" if r["ms"] >= 100 else f"{r['ms']:.3g}"
        lines.append(
            f"| {r['shape']} | {r['dtype']} | {r['system']} | {ms} | {ratio} | {rate} | {r['kept_mb']:.0f} | {share} |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="layer", description=(__doc__ or "").split("\n\n")[0])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    parser.add_argument("--shapes", nargs="+", choices=sorted(SHAPES), default=DEFAULTS[device.type])
    dtypes = ["float32", "bfloat16", "float16"]
    parser.add_argument("--dtypes", nargs="+", choices=dtypes, default=dtypes[1:2] if on_gpu else dtypes[:2])
    default = ["auto", "triton", "grouped", "eager"] if on_gpu else ["auto"]
    parser.add_argument("--backends", nargs="+", default=default, choices=["auto", *BACKENDS])
    parser.add_argument("--experts", choices=["gelu", "swiglu"], default="gelu", help="two or three matrices")
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
    cases = [(dtype, name) for dtype in args.dtypes for name in args.shapes]
    tops: dict[str, tuple[float, float]] = {}
    for dtype, name in each(cases, "shapes"):
        if dtype not in tops:
            top = tops[dtype] = ceilings(device, getattr(torch, dtype))
            say(f"{dtype}: a large product {top[0] / 1e12:.3g} TFLOP/s, a copy {top[1] / 1e9:.3g} GB/s")
        # Eight times the tokens: fewer rounds say as much.
        rounds = args.rounds if SHAPES[name].T <= 4096 or on_gpu else max(3, args.rounds // 3)
        gated, kind = args.experts == "swiglu", getattr(torch, dtype)
        new = measure(SHAPES[name], kind, args.backends, rounds, args.peers, gated, device, tops[dtype])
        say(table(new) if not rows else "\n".join(table(new).splitlines()[2:]))
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
