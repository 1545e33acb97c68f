"""Time and memory of low-rank experts beside a frozen linear, against every expert computed and then weighted.

    python benchmarks/lora_experts.py                # the table of docs/results/experts.md
    python benchmarks/lora_experts.py --rounds 30

The other way is that of peft, which takes the tokens through the matrices of every expert and weights what comes out:
adapter by adapter, as its layers do, and with the adapters stacked, as its Arrow router does. All have the same router,
weights, tokens and output. A step is forward and backward, to the tokens as well. Every round times each system once,
in turn, and the ratio is taken within the round. "Kept" is what the forward keeps for the backward; the peak is that of
a step in a process of its own, above what it had before.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import core
from apps.base.machine import machine_line
from core.memory import kept_bytes


class EveryExpert(nn.Module):
    """The other way: ``sum_e g_e * scale * x w_a w_b`` over all experts, at gates that are zero outside the choice."""

    def __init__(self, layer: core.MoE, stacked: bool) -> None:
        super().__init__()
        self.router, self.experts, self.stacked = layer.router, layer.experts, stacked

    def gates(self, x_BSD: Tensor) -> Tensor:
        routing = self.router(x_BSD)
        gates_TE = routing.gates_N.new_zeros(routing.num_tokens, self.experts.num_experts)
        return gates_TE.index_put((routing.token_index_N, routing.expert_ids_N), routing.gates_N)

    def forward(self, x_BSD: Tensor) -> Tensor:
        gates_TE, x_TD, experts = self.gates(x_BSD), x_BSD.flatten(0, 1), self.experts
        if self.stacked:
            h_TEr = torch.einsum("td,edr->ter", x_TD, experts.w_a)
            y_TEO = torch.einsum("ter,ero->teo", h_TEr, experts.w_b) * experts.scale
            return (y_TEO * gates_TE[..., None]).sum(1).unflatten(0, x_BSD.shape[:2])
        y_TO = x_TD.new_zeros(x_TD.shape[0], experts.w_b.shape[-1])
        for e in range(experts.num_experts):
            y_TO = y_TO + x_TD @ experts.w_a[e] @ experts.w_b[e] * experts.scale * gates_TE[:, e, None]
        return y_TO.unflatten(0, x_BSD.shape[:2])


class Beside(nn.Module):
    """A frozen linear and what is added to its output."""

    def __init__(self, base: nn.Linear, update: nn.Module) -> None:
        super().__init__()
        self.base, self.update = base.requires_grad_(False), update

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.update(x)


SYSTEMS = ("moesaic", "every expert, one by one", "every expert, stacked")


def systems(args: argparse.Namespace) -> dict[str, nn.Module]:
    """Return each system, alone and beside the frozen linear; all share their weights."""
    torch.manual_seed(0)
    config = core.MoEConfig(args.experts, core.TokenChoice(args.top_k), core.LoRA(args.rank, alpha=2.0 * args.rank))
    layer = config.build(args.dim, args.out_dim)
    nn.init.normal_(layer.experts.w_b, std=0.02)
    base = nn.Linear(args.dim, args.out_dim)
    alone = dict(zip(SYSTEMS, (layer, EveryExpert(layer, False), EveryExpert(layer, True)), strict=True))
    return {**alone, **{f"{name}, and the linear": Beside(base, each) for name, each in alone.items()}}


def step(layer: nn.Module, args: argparse.Namespace) -> Callable[[], None]:
    torch.manual_seed(1)
    x = torch.randn(args.tokens // 256, 256, args.dim, requires_grad=True)
    dy = torch.randn(*x.shape[:2], args.out_dim)

    def run() -> None:
        x.grad = None
        layer.zero_grad(set_to_none=True)
        layer(x).backward(dy)

    return run


def memory(field: str) -> int:
    """Return bytes of this process, "VmRSS" now or "VmHWM" at the peak since ``clear_refs``; Linux alone knows them."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def peak(name: str, args: argparse.Namespace) -> int:
    """Return the most memory of a first step above that before it, in bytes."""
    torch.set_num_threads(args.threads)
    run = step(systems(args)[name], args)
    small = argparse.Namespace(**{**vars(args), "tokens": 256})
    step(systems(args)[name], small)()  # libraries are loaded
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    before = memory("VmRSS")
    run()
    return memory("VmHWM") - before


def quartiles(values: list[float]) -> tuple[float, float, float]:
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return low, middle, high


def measure(args: argparse.Namespace) -> list[dict]:
    """Return a row for each system: milliseconds, bytes, and the ratios of ours to it."""
    layers = systems(args)
    check_equal(layers, args)
    runs = {name: step(layer, args) for name, layer in layers.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(args.rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if i:  # the first one warms up
                seconds[name].append(time.perf_counter() - start)
    x = torch.randn(args.tokens // 256, 256, args.dim, requires_grad=True)
    kept = {name: kept_bytes(layer, x) for name, layer in layers.items()}
    peaks: dict[str, int] = {}
    if not args.no_peak and Path("/proc/self/status").exists():
        for name in layers:  # a new process each: memory that another system had is not there again
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                peaks[name] = pool.apply(peak, (name, args))
    rows = []
    for name, times in seconds.items():
        ours = name.replace(next(s for s in SYSTEMS if name.startswith(s)), SYSTEMS[0])
        rows.append(
            {
                "system": name,
                "ms": quartiles([t * 1e3 for t in times]),
                "time": quartiles([a / b for a, b in zip(seconds[ours], times, strict=True)]),
                "kept": kept[name],
                "kept_ratio": kept[ours] / kept[name],
                "peak": peaks.get(name),
                "peak_ratio": peaks[ours] / peaks[name] if peaks.get(name) else None,
            }
        )
    return rows


def check_equal(layers: dict[str, nn.Module], args: argparse.Namespace) -> None:
    """Raise an ``AssertionError`` where two systems put out other numbers, or have another gradient."""
    torch.manual_seed(2)
    x = torch.randn(1, 64, args.dim)
    for with_base in (False, True):
        expected = None
        for name, layer in layers.items():
            if name.endswith("linear") != with_base:
                continue
            own = x.clone().requires_grad_()
            layer.zero_grad(set_to_none=True)
            y = layer(own)
            y.square().sum().backward()
            values = [y.detach(), own.grad, *(p.grad for p in layer.parameters() if p.requires_grad)]
            expected = values if expected is None else expected
            for value, wanted in zip(values, expected, strict=True):
                torch.testing.assert_close(value, wanted, rtol=1e-3, atol=1e-3 * float(wanted.abs().max()))


def table(rows: list[dict]) -> str:
    lines = [
        "| system | ms (quartiles) | moesaic's time (quartiles) | kept, MB | moesaic's | peak, MB | moesaic's |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        low, ms, high = r["ms"]
        first, ratio, last = r["time"]
        cells = [r["system"], f"{ms:.1f} ({low:.1f}-{high:.1f})", f"{ratio:.2f}x ({first:.2f}-{last:.2f})"]
        cells += [f"{r['kept'] / 1e6:.0f}", f"{100 * r['kept_ratio']:.0f} %"]
        share = "–" if r["peak_ratio"] is None else f"{100 * r['peak_ratio']:.0f} %"
        cells += ["–" if r["peak"] is None else f"{r['peak'] / 1e6:.0f}", share]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="lora_experts", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--tokens", type=int, default=4096, help="a multiple of 256")
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--out_dim", type=int, default=3072)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--top_k", type=int, default=2)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds of each system, after one warm-up")
    parser.add_argument("--no_peak", action="store_true", help="start no processes to measure the peak memory in")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads")
    args = parser.parse_args(argv)
    if args.rounds < 1:
        parser.error(f"--rounds {args.rounds} is not at least 1")
    if args.tokens < 256 or args.tokens % 256:
        parser.error(f"--tokens {args.tokens} is not a multiple of 256")
    torch.set_num_threads(args.threads)
    print(machine_line(), flush=True)
    print(table(measure(args)), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
