"""What this machine reaches, in place of a GPU's published figures: products, and the exchange of torchrun's ranks."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from apps.cli.errors import UsageError
from apps.plan.formulas import Gpu
from core.kernels.cpu import Linear

_SECONDS = 0.3
"""How long a figure is measured, at least."""


def measured_gpu(given: Mapping[str, float]) -> Gpu:
    """Return what one rank of this machine reaches; under torchrun all ranks call it.

    Products are of square matrices. A bandwidth is that of an exchange of all with all: of the ranks of each node, all
    nodes at once, and of one rank of each node with those of the same place, all places at once.

    Args:
        given: fields of ``Gpu`` that are taken as they are and not measured.

    Raises:
        UsageError: a bandwidth is not given, and there are no two ranks to measure it with.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    world, local = (int(os.environ.get(name, "1")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    _check_ranks(given, world, local)
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    figures = {
        "memory": lambda: _memory(device, local),
        "half": lambda: _products(device, torch.bfloat16),
        "single": lambda: _products(device, torch.float32),
        "within": lambda: _exchange(device, [range(n, n + local) for n in range(0, world, local)]),
        "between": lambda: _exchange(device, [range(place, world, local) for place in range(local)]),
    }
    with _ranks(device, world):
        return Gpu(**{name: given[name] if name in given else measure() for name, measure in figures.items()})


def _check_ranks(given: Mapping[str, float], world: int, local: int) -> None:
    """Raise a ``UsageError`` where a bandwidth is neither given nor can be measured."""
    if "within" not in given and local == 1:
        raise UsageError(
            "the bandwidth within a node is measured among several processes: start moesaic plan by "
            "torchrun --nproc-per-node N -m apps.cli plan ..., or give --node_bandwidth"
        )
    if "between" not in given and world == local:
        raise UsageError(
            "the bandwidth between nodes is measured among several of them: start moesaic plan by "
            "torchrun --nnodes N -m apps.cli plan ..., or give --network_bandwidth"
        )


@contextmanager
def _ranks(device: torch.device, world: int) -> Iterator[None]:
    """Connect torchrun's ranks meanwhile."""
    if world == 1 or dist.is_initialized():
        yield
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def _memory(device: torch.device, local: int) -> float:
    """Return the memory of the GPU, or of a node's rank on processors, in bytes."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / local


def _products(device: torch.device, dtype: torch.dtype) -> float:
    """Return the FLOP/s of a product of square matrices, by the layer that models have."""
    n = 8192 if device.type == "cuda" else 1024
    layer, x = Linear(n, n, bias=False, device=device, dtype=dtype), torch.randn(n, n, device=device, dtype=dtype)
    with torch.no_grad():
        return 2.0 * n**3 / _seconds(lambda: layer(x), x)


def _exchange(device: torch.device, groups: Sequence[Sequence[int]]) -> float:
    """Return the bytes a second that leave a rank in an exchange of all with all within its group, the mean of all."""
    W = len(groups[0])
    sent = torch.zeros(W * (2**24 if device.type == "cuda" else 2**20), device=device)
    received = torch.empty_like(sent)
    (own,) = (g for ranks in groups if (g := dist.new_group(list(ranks))) != dist.GroupMember.NON_GROUP_MEMBER)
    seconds = torch.tensor(_seconds(lambda: dist.all_to_all_single(received, sent, group=own), sent), device=device)
    dist.all_reduce(seconds)
    return sent.nbytes * (W - 1) / W / (float(seconds) / dist.get_world_size())


def _seconds(work: Callable[[], object], on: Tensor) -> float:
    """Return the mean seconds of some work, which is repeated; ranks repeat it as often as the first one."""

    def timed(times: int) -> float:
        start = time.perf_counter()
        for _ in range(times):
            work()
        if on.is_cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start

    timed(1)  # buffers and connections are made
    once = torch.tensor(timed(1), device=on.device)
    if dist.is_initialized():
        dist.all_reduce(once, dist.ReduceOp.MAX)
    times = max(int(_SECONDS / float(once)), 1)
    return timed(times) / times
