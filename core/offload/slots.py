"""``SlotPool``: the slots on the device that experts of equal shapes take in turn."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import nn

from .statistics import OffloadStatistics
from .stores import Store

POLICIES = ("lfru", "lru")
HALF_LIFE = 16
"""Calls of each module of experts after which a use counts half in "lfru"."""


class Expert(NamedTuple):
    """One expert: the number of its module, and its own number in it."""

    module: int
    number: int


@dataclass
class Resident:
    """An expert in a slot.

    Attributes:
        slot: its row of the pool's tensors.
        loading: the prefetch that fills the slot, until a call has asked for the expert; None: it is filled.
    """

    slot: int
    loading: Future[None] | None = None


@dataclass
class Usage:
    """How often and how lately an expert was needed.

    Attributes:
        uses: number of uses, each counted half after ``HALF_LIFE``.
        last: number of the call that needed it last, or for which it was prefetched last.
    """

    uses: float = 0.0
    last: float = -math.inf


@dataclass
class SlotPool:
    """Slots that the experts of several modules share: each holds one expert of any of them.

    A slot that is needed is taken from the expert of the lowest value. With "lru" that is the one whose last use is
    longest ago, with "lfru" the one with the fewest uses, and a use counts half after ``HALF_LIFE`` calls of each
    module: frequency and recency in one number (LRFU, Lee et al. 2001). An expert that only a prefetch brought and no
    call used goes first.

    One pool for all layers is far better than one per layer: an encoder-decoder needs the decoder's experts at every
    step and the encoder's once (``docs/serving.md`` has the figures).

    Args:
        shapes: shape and dtype of each tensor of an expert.
        count: number of slots.
        device: their device.
        policy: "lfru" or "lru".
        stores: the store of each module by its number.
    """

    shapes: Mapping[str, tuple[torch.Size, torch.dtype]]
    count: int
    device: torch.device
    policy: str
    stores: Mapping[int, Store]
    tensors: dict[str, nn.Parameter] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.bytes_per_expert = sum(shape.numel() * dtype.itemsize for shape, dtype in self.shapes.values())
        self.half_life = HALF_LIFE * len(self.stores)
        self.num_experts = sum(len(next(iter(store.tensors.values()))) for store in self.stores.values())
        self._usage: dict[Expert, Usage] = {}
        self._clock = 0
        self._stream: torch.cuda.Stream | None = None
        self._fill(self.device)

    def _fill(self, device: torch.device) -> None:
        """Make new, empty tensors."""
        self.device = device
        self.resident: dict[Expert, Resident] = {}
        self.free = list(range(self.count))[::-1]
        self._coming: list[Expert] = []
        with torch.inference_mode(False):  # tensors of inference mode could not be written outside of it
            for name, (shape, dtype) in self.shapes.items():
                # Zeros: nobody reads a slot before its first expert, but its contents have to be finite.
                rows = torch.zeros(self.count, *shape, dtype=dtype, device=device)
                if name in self.tensors:
                    self.tensors[name].data = rows  # the modules that compute keep their parameter
                else:
                    self.tensors[name] = nn.Parameter(rows, requires_grad=False)
            # Made once: to make them took a fifth of the fetching thread's time for an expert of 128 kB in memory.
            self._rows = [{name: t.data[slot] for name, t in self.tensors.items()} for slot in range(self.count)]

    def move(self, device: torch.device) -> None:
        """Continue with empty slots on another device."""
        if device != self.device:
            wait([r.loading for r in self.resident.values() if r.loading is not None])
            self._fill(device)

    def forget(self, module: int) -> None:
        """Empty the slots that hold experts of a module."""
        for expert in [expert for expert in self.resident if expert.module == module]:
            held = self.resident.pop(expert)
            if held.loading is not None and not held.loading.cancel():
                wait([held.loading])
            self.free.append(held.slot)

    def require(self, module: int, numbers: Sequence[int], statistics: OffloadStatistics) -> list[int]:
        """Return the slots of a module's experts, after loading the experts without a slot.

        Args:
            module: the module's number.
            numbers: its experts, at most ``count`` of them.
            statistics: counters.

        Raises:
            ValueError: the store was changed.
        """
        self._clock += 1
        needed = [Expert(module, number) for number in numbers]
        missing = []
        for expert in needed:
            held = self.resident.get(expert)
            if held is None or (held.loading is not None and not held.loading.done()):
                missing.append(expert)
            else:
                statistics.hits += 1
                self._arrive(expert)
            self._touch(expert, self._clock, 1.0)
        if missing:
            statistics.misses += len(missing)
            begin = time.perf_counter()
            for expert in missing:
                held = self.resident.get(expert)
                if held is not None:
                    statistics.late += 1
                    if held.loading is not None and not held.loading.cancel():
                        self._arrive(expert)
                        continue
                    held.loading = None  # it has not begun: faster than to wait for those before it
                    self._load(expert, held.slot)
                    continue
                slot = self._take_slot(set(needed), statistics)
                assert slot is not None  # there are as many slots as needed experts at least
                self._load(expert, slot)
                self.resident[expert] = Resident(slot)
                statistics.bytes_moved += self.bytes_per_expert
            if self.device.type == "cuda":
                torch.cuda.current_stream(self.device).synchronize()
            statistics.stall_seconds += time.perf_counter() - begin
        return [self.resident[expert].slot for expert in needed]

    def prefetch(
        self,
        wanted: Sequence[Expert],
        kept: Iterable[Expert],
        worker: ThreadPoolExecutor,
        statistics: OffloadStatistics,
    ) -> None:
        """Start to fetch experts that the next call may need.

        Args:
            wanted: the experts, the most probable first.
            kept: experts that the call at hand computes with, which keep their slots.
            worker: thread that loads.
            statistics: counters.
        """
        self._drop_late(set(wanted), statistics)
        for expert in wanted:
            self._touch(expert, self._clock + 0.5, 0.0)
        safe = {*wanted, *kept}
        jobs = []
        for expert in wanted:
            if expert in self.resident:
                continue
            slot = self._take_slot(safe, statistics, at_once=True)
            if slot is None:
                break
            loading: Future[None] = Future()
            self.resident[expert] = Resident(slot, loading)
            self._coming.append(expert)
            jobs.append((expert, slot, loading))
            statistics.prefetched += 1
            statistics.bytes_moved += self.bytes_per_expert
        if jobs:  # one message to the thread: each costs it and this one a change of hands
            written = torch.cuda.current_stream(self.device).record_event() if self.device.type == "cuda" else None
            worker.submit(self._load_aside, jobs, written)

    def _drop_late(self, wanted: set[Expert], statistics: OffloadStatistics) -> None:
        """Give up earlier prefetches that have not begun and are not wanted any more."""
        coming = []
        for expert in self._coming:
            held = self.resident.get(expert)
            if held is None or held.loading is None or held.loading.done():
                continue
            if expert not in wanted and held.loading.cancel():
                del self.resident[expert]
                self.free.append(held.slot)
                statistics.prefetched -= 1
                statistics.bytes_moved -= self.bytes_per_expert
            else:
                coming.append(expert)
        self._coming = coming

    def _touch(self, expert: Expert, time: float, uses: float) -> None:
        """Add uses of an expert at a time that is counted in calls."""
        usage = self._usage.setdefault(expert, Usage())
        usage.uses = usage.uses * 2.0 ** ((usage.last - time) / self.half_life) + uses
        usage.last = time

    def _value(self, expert: Expert) -> tuple[float, float]:
        """Return the value of an expert's slot, to be compared with others at the same time."""
        usage = self._usage[expert]
        if self.policy == "lru":
            return usage.last, 0.0
        return usage.uses * 2.0 ** ((usage.last - self._clock) / self.half_life), usage.last

    def _arrive(self, expert: Expert) -> None:
        """Wait until a prefetched expert is there, and raise what went wrong on its way."""
        held = self.resident[expert]
        if held.loading is not None:
            try:
                held.loading.result()
            except BaseException:
                del self.resident[expert]
                self.free.append(held.slot)
                raise
            held.loading = None

    def _take_slot(self, kept: set[Expert], statistics: OffloadStatistics, at_once: bool = False) -> int | None:
        """Return a slot that is free from now on: an empty one, or the slot of the expert with the lowest value.

        Args:
            kept: experts that keep their slots.
            statistics: counts prefetches that were in vain.
            at_once: return None instead of waiting if the only candidates are slots still being filled.
        """
        if self.free:
            return self.free.pop()
        candidates = [
            expert
            for expert, held in self.resident.items()
            if expert not in kept and (held.loading is None or held.loading.done() or not at_once)
        ]
        if not candidates:
            return None
        expert = min(candidates, key=self._value)
        held = self.resident.pop(expert)
        if held.loading is not None:
            statistics.unused += 1
            if not held.loading.cancel():
                wait([held.loading])  # what went wrong there goes wrong again where the expert is needed
        return held.slot

    def _load(self, expert: Expert, slot: int) -> None:
        try:
            self.stores[expert.module].load(expert.number, self._rows[slot])
        except BaseException:
            self.resident.pop(expert, None)
            self.free.append(slot)
            raise

    @torch.no_grad()
    def _load_aside(self, jobs: list[tuple[Expert, int, Future[None]]], written: torch.cuda.Event | None) -> None:
        """Load on the worker's thread; on CUDA on a stream next to the one that computes, after that stream's reads."""
        if written is not None and self._stream is None:
            self._stream = torch.cuda.Stream(self.device)
        with contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            for expert, slot, loading in jobs:
                if not loading.set_running_or_notify_cancel():
                    continue
                try:
                    if self._stream is not None and written is not None:
                        self._stream.wait_event(written)
                    self.stores[expert.module].load(expert.number, self._rows[slot])
                    if self._stream is not None:
                        self._stream.synchronize()
                except BaseException as error:  # for the call that needs the expert
                    loading.set_exception(error)
                else:
                    loading.set_result(None)
