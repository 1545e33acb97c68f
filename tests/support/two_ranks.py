"""Work in a few processes that are gloo ranks."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

WORLD = 2


def on_two_ranks(work: Callable[[int], Any], folder: Path, preload: Sequence[str] = ()) -> list[Any]:
    """Return what ``work(rank)`` returns on each rank; see ``on_ranks``."""
    return on_ranks(work, folder, WORLD, preload)


def on_ranks(work: Callable[[int], Any], folder: Path, world: int, preload: Sequence[str] = ()) -> list[Any]:
    """Return what ``work(rank)`` returns on each of ``world`` ranks, with the ``preload`` of ``fork``; ``folder`` is
    empty."""
    fork(_worker, (work, str(folder), world), world, preload)
    return results(folder, world)


def results(folder: Path, world: int) -> list[Any]:
    """Return what ``on_ranks`` has returned in a folder."""
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(world)]


def fork(work: Callable[..., Any], arguments: tuple[Any, ...], count: int, preload: Sequence[str] = ()) -> None:
    """Run ``work(rank, *arguments)`` in ``count`` processes, and wait for them.

    The first call of a process decides which modules are imported once for all ranks; ``preload`` has further ones.
    """
    # The processes are forks of one that has imported this: an import of torch takes longer than most of the work.
    multiprocessing.set_forkserver_preload(["torch.distributed.fsdp", "core.parallel", *preload])
    mp.start_processes(work, args=arguments, nprocs=count, start_method="forkserver")


def _worker(rank: int, work: Callable[[int], Any], folder: str, world: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", world), rank=rank, world_size=world)
    try:
        torch.save(work(rank), f"{folder}/rank{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()
