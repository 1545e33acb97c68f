"""The memory that ``moesaic plan`` foresees beside what a training of two processes takes, in float32 with gloo.

    torchrun --standalone --nproc-per-node 2 benchmarks/plan.py
    torchrun --standalone --nproc-per-node 2 benchmarks/plan.py --rest shard --checkpointing

A model of the same widths with fewer layers and experts is trained first, so that libraries, their buffers, connections
and threads are there; the resident memory is then the baseline, and its high-water mark begins anew. What the large
model adds to it in three steps, at most, is the measured figure. The processor's kept buffers
(``core/kernels/cpu/pages.py``) are off, and freed memory goes back to the system at once, so that resident memory is
memory in use.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import logging
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

import core
from apps.nets.config import TransformerConfig
from apps.nlp.language.data import TextBatch
from apps.nlp.language.module import LanguageModeler
from apps.nlp.sizes import Vocabulary
from apps.plan.layout import Layout, cost
from apps.plan.options import PlanOptions
from apps.plan.outline import measured
from apps.train.sharded.expert_parallel import ExpertParallelStrategy
from apps.train.step.module import OptimizerConfig
from core.kernels.cpu import pages

M_MMAP_THRESHOLD = -3
"""glibc's option: larger blocks are asked of the system one by one, and go back to it when they are freed."""


def modeler(args: argparse.Namespace) -> LanguageModeler:
    return LanguageModeler(
        Vocabulary(num_ids=args.vocab),
        TransformerConfig(
            dim=args.dim,
            hidden_dim=args.hidden,
            num_heads=args.dim // 64,
            decoder_layers=args.layers,
            positions="rotary",
            norm="rms",
            activation="silu",
            gated=True,
            bias=False,
            tie="decoder",
            dropout=0.0,
        ),
        core.MoEConfig(args.experts, core.TokenChoice(top_k=2), core.SwiGLU(hidden_dim=args.hidden)),
        optimizer=OptimizerConfig(schedule="constant", warmup_steps=0),
    )


def train(module: LanguageModeler, args: argparse.Namespace, experts: int) -> None:
    """Train a few steps on random tokens."""
    g = torch.Generator().manual_seed(dist.get_rank())
    shape = (args.batch, args.length + 1)
    batches = [TextBatch(torch.randint(4, args.vocab, shape, generator=g), torch.arange(args.batch)) for _ in range(3)]
    strategy = ExpertParallelStrategy(
        expert_parallel_size=experts, non_experts=args.rest, activation_checkpointing=args.checkpointing
    )
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            accelerator="cpu",
            devices=dist.get_world_size(),
            strategy=strategy,
            default_root_dir=folder,
            max_epochs=1,
            logger=False,
            use_distributed_sampler=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]


def status(name: str) -> float:
    """Return the bytes that Linux says of this process under "VmRSS" (resident) or "VmHWM" (at most so far)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("dim", 512), ("hidden", 1024), ("layers", 4), ("experts", 8), ("vocab", 8000)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--batch", type=int, default=2, help="texts of a process")
    parser.add_argument("--length", type=int, default=256, help="tokens of a text")
    parser.add_argument("--rest", choices=("replicate", "shard"), default="replicate")
    parser.add_argument("--checkpointing", action="store_true")
    args = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    pages.SMALLEST = sys.maxsize
    libc = ctypes.CDLL("libc.so.6")
    libc.mallopt(M_MMAP_THRESHOLD, 65536)
    dist.init_process_group("gloo")
    world = dist.get_world_size()
    small = argparse.Namespace(**{**vars(args), "layers": 2, "experts": world})
    train(modeler(small), small, world)
    gc.collect()
    libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    baseline = status("VmRSS")
    train(modeler(args), args, world)
    peaks: list[Any] = [None] * world
    dist.all_gather_object(peaks, status("VmHWM") - baseline)
    if dist.get_rank() == 0:
        report(args, world, peaks, baseline)
    dist.barrier()
    dist.destroy_process_group()


def report(args: argparse.Namespace, world: int, peaks: list[float], baseline: float) -> None:
    options = PlanOptions(
        files=(),
        gpus=world,
        gpus_per_node=world,
        kind="h100",
        given_precision="32-true",
        activation_checkpointing=args.checkpointing,
        batch=args.batch,
        length=args.length,
    )
    with torch.device("meta"):
        outline = measured(modeler(args), options)
    layout = Layout(replicas=1, experts=world, rest=args.rest)
    memory = cost(outline, options, layout).memory
    print(
        f"{outline.num_params:,} parameters, {world} processes, {args.rest}"
        f"{', checkpointing' if args.checkpointing else ''}, torch {torch.__version__}"
    )
    parts = ("weights", "gradients", "optimizer", "activations", "temporary")
    print("planned, MB: " + ", ".join(f"{name} {getattr(memory, name) / 1e6:.0f}" for name in parts))
    print(f"the process before, MB: {baseline / 1e6:.0f}")
    for rank, peak in enumerate(peaks):
        ratio = memory.total / peak - 1
        print(
            f"rank {rank}: measured {peak / 1e6:.0f} MB, planned {memory.total / 1e6:.0f} MB ({ratio:+.1%})", flush=True
        )


if __name__ == "__main__":
    main()
