"""MoE layers of transformers by this engine's kernels, and LoRA on their experts, next to transformers and peft.

    python benchmarks/hub.py                           # the tables of docs/results/experts.md
    python benchmarks/hub.py --scale 8 --rounds 3

A layer has the shape of OLMoE's or Qwen3-30B-A3B's, divided by ``--scale`` in width and hidden width. Systems run in
turn, with the same weights and tokens, forward alone and with the backward. ``kept`` is what a forward keeps for the
backward, in MiB.
"""

from __future__ import annotations

import argparse
import copy
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import apps.hub
import core
from apps.base.machine import machine_line
from benchmarks._rounds import in_turn, rates, write_rows
from core.memory import kept_bytes

SHAPES = {"OLMoE": ("Olmoe", 2048, 1024, 64, 8), "Qwen3-30B-A3B": ("Qwen3Moe", 2048, 768, 128, 8)}
SYSTEMS = ("eager", "grouped_mm", "moesaic", "adopted")
TUNED = ("peft", "moesaic", "moesaic int4")


@dataclass(frozen=True)
class Row:
    """A line of a table: median tokens per second, its quartiles, and the median ratio to the first system's."""

    layer: str
    system: str
    dtype: str
    tokens: int
    backward: bool
    tokens_per_second: float
    quartiles: tuple[float, float]
    ratio: float | None
    kept_mib: float


def layer_of(name: str, scale: int, implementation: str, dtype: torch.dtype) -> Any:
    """Return a model of one layer with random weights; its block is ``model.model.layers[0].mlp``."""
    import transformers

    family, dim, hidden, experts, top_k = SHAPES[name]
    width = hidden // scale
    config = getattr(transformers, f"{family}Config")(
        vocab_size=32, hidden_size=dim // scale, intermediate_size=width, moe_intermediate_size=width,
        num_experts=experts, num_experts_per_tok=top_k, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=4, norm_topk_prob=True, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        experts_implementation=implementation,
    )  # fmt: skip
    torch.manual_seed(0)
    return getattr(transformers, f"{family}ForCausalLM")(config).to(dtype)


def loop(block: nn.Module, x: Tensor, backward: bool, repeats: int) -> Callable[[], float]:
    """Return what runs a block so often and returns the seconds of one run."""

    def run() -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            with torch.set_grad_enabled(backward):
                out: Any = block(x)
                out = out[0] if isinstance(out, tuple) else out
            if backward:
                out.float().sum().backward()
                x.grad = None
                block.zero_grad()
        return (time.perf_counter() - start) / repeats

    return run


def measured(
    layer: str, models: dict[str, Any], tokens: int, dtype: torch.dtype, backward: bool, rounds: int
) -> list[Row]:
    blocks = {name: model.model.layers[0].mlp for name, model in models.items()}
    dim = next(iter(models.values())).config.hidden_size
    x = torch.randn(1, tokens, dim, dtype=dtype).requires_grad_(backward)
    repeats = max(1, 64 // tokens)
    seconds = in_turn({name: loop(block, x, backward, repeats) for name, block in blocks.items()}, rounds)
    first = next(iter(models))
    rows = []
    for name, (low, middle, high), ratio in rates(seconds, tokens, first):
        kept = kept_bytes(blocks[name], x) / 2**20 if backward else 0.0
        rows.append(Row(layer, name, str(dtype)[6:], tokens, backward, middle, (low, high), ratio, kept))
        way = "forward and backward" if backward else "forward"
        print(f"{layer:14} {name:13} {rows[-1].dtype:9} {tokens:5} {way:21} {middle:10,.0f} {ratio:6.2f} {kept:8.1f}")
    return rows


def kernels(scale: int, rounds: int, sizes: tuple[int, ...]) -> list[Row]:
    """Return the rows of the experts implementations and of the adopted block."""
    apps.hub.register()
    rows = []
    for layer in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            models = {s: layer_of(layer, scale, "eager" if s == "adopted" else s, dtype) for s in SYSTEMS}
            core.adopt(models["adopted"])
            for tokens in sizes:
                for backward in (False, True):
                    rows += measured(layer, models, tokens, dtype, backward, rounds)
    return rows


def adapters(scale: int, rounds: int, sizes: tuple[int, ...]) -> list[Row]:
    """Return the rows of LoRA of rank 16 on the experts."""
    import peft

    rows = []
    for layer in SHAPES:
        plain = layer_of(layer, scale, "grouped_mm", torch.float32)
        config = peft.LoraConfig(r=16, lora_alpha=32, target_parameters=["experts.gate_up_proj", "experts.down_proj"])
        models = {"peft": peft.get_peft_model(copy.deepcopy(plain), config).base_model.model}
        for name in TUNED[1:]:
            models[name] = core.adopt(copy.deepcopy(plain))
            if name.endswith("int4"):
                core.quantize_experts(models[name], 4)
            core.add_adapters(models[name], core.LoRA(16, alpha=32), "experts")
        for tokens in sizes:
            rows += measured(f"{layer}, LoRA", models, tokens, torch.float32, True, rounds)
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=int, default=4, help="divisor of the layers' widths")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4096])
    parser.add_argument("--json", type=Path, help="file for the rows")
    options = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    import peft
    import transformers

    print(machine_line())
    sizes = tuple(options.tokens)
    rows = kernels(options.scale, options.rounds, sizes) + adapters(options.scale, options.rounds, sizes[-1:])
    versions = {"transformers": transformers.__version__, "peft": peft.__version__}
    write_rows(options.json, rows, versions, scale=options.scale, rounds=options.rounds)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
