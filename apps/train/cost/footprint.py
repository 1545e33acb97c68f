"""The resources that a model takes: bytes that stay, bytes of a pass, and seconds compared with another model's."""

from __future__ import annotations

import contextlib
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile


def resident_bytes(model: nn.Module) -> int:
    """Return the bytes of the parameters and buffers of a model; tensors that share memory count once."""
    memories = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for tensor in (*model.parameters(), *model.buffers())
    }
    return sum(memories.values())


def peak_bytes(run: Callable[[], Any], device: torch.device) -> int:
    """Return the bytes that torch allocates at most while ``run`` runs, beyond those that are there before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device) - before)
    with _silent(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
    events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def used_memory(device: torch.device, peak: bool) -> int:
    """Return the bytes that this process uses now, or at most until now: of a GPU's memory, else of the machine's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) if peak else torch.cuda.memory_allocated(device)
    with contextlib.suppress(OSError):  # Linux has a status, and a ru_maxrss that starts at the parent's size
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:" if peak else "VmRSS:"):
                return 1024 * int(line.split()[1])
    import resource  # Windows has none

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


ROUND_SECONDS = 0.2
"""Least duration of a model's turn, which is one pass or more."""


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Suppress writes to the process's stderr, to which torch's profiler says that it starts and stops."""
    sys.stderr.flush()
    kept, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nothing)


@dataclass(frozen=True)
class Seconds:
    """Seconds of two models in the same rounds.

    Attributes:
        own: seconds of a pass in each round.
        trained: seconds of the trained model.
    """

    own: tuple[float, ...]
    trained: tuple[float, ...]

    @property
    def ratios(self) -> list[float]:
        """Return the own seconds as a share of the trained model's, by round: a slow machine slows both."""
        return [a / b for a, b in zip(self.own, self.trained, strict=True)]

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)

    @property
    def interval(self) -> tuple[float, float]:
        """Return the least interval of two ratios that holds the median of all such rounds with 95 %, or all there are.

        It takes the number of ratios below the median, which is binomial with p = 1/2, whatever their distribution.
        """
        ratios = sorted(self.ratios)
        cut = outside_median(len(ratios))
        return ratios[cut], ratios[-1 - cut]


def outside_median(count: int) -> int:
    """Return how many of ``count`` sorted values may be left out at each end of a 95 % interval of their median.

    Example::

        outside_median(9)    # 1: 2 * P(Binomial(9, 1/2) <= 1) = 2 * 10 / 512 = 0.039; with 2 it would be 0.180
    """
    left, tail, ways = 0, 0, 1
    for below in range(count // 2):
        tail += ways
        if 2 * tail > 0.05 * 2**count:
            break
        left = below
        ways = ways * (count - below) // (below + 1)
    return left


def in_rounds(own: Callable[[], Any], trained: Callable[[], Any], rounds: int, device: torch.device) -> Seconds:
    """Time the passes of two models in turn, and return the seconds of a pass in each of ``rounds``.

    A turn is as many passes as ``ROUND_SECONDS`` take, the same number for both. Each model goes first in every other
    round. A pass of each comes before them and counts nowhere.
    """

    def timed(run: Callable[[], Any], times: int) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        for _ in range(times):
            run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return (time.perf_counter() - start) / times

    first = min(timed(own, 1), timed(trained, 1))
    times = math.ceil(ROUND_SECONDS / first) if first else 1
    seconds: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds):
        order: Sequence[int] = (1, 0) if number % 2 else (0, 1)
        for place in order:
            seconds[place].append(timed((own, trained)[place], max(times, 1)))
    return Seconds(tuple(seconds[0]), tuple(seconds[1]))
