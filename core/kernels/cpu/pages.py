"""Large buffers whose memory is used again.

The weight gradients of a layer are E times as large as a dense layer's share of the work, and each step asks the system
for them again. On Linux that is a page fault for every 4 kB, up to 2 us: 16 % of a layer's training step (user and
system time, one thread) at E=32, D=256, F=512, and 5 % in float32 at Fashion-MNIST's E=8, D=128, F=256. Pages of 2 MB,
if the system has them, cost a seventh of that; memory that the process has already costs nothing. So freed buffers are
kept for the next of their size, as torch does on a GPU. The system may take their pages back at any time (MADV_FREE),
so kept buffers are in nobody's way. On other systems nothing is done.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import sys
import threading
import weakref
from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

_PAGE = 2 << 20
SMALLEST = 2 * _PAGE
"""Bytes of the smallest buffer that is kept; torch's own memory serves the smaller ones."""


def supported() -> bool:
    return sys.platform == "linux" and hasattr(mmap, "MADV_HUGEPAGE") and hasattr(mmap, "MADV_FREE")


_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def keep_freed(size: int = 1 << 30) -> None:
    """Make the C library keep up to ``size`` bytes of freed memory for this process; on others than glibc do nothing.

    By default the memory of a forward's activations goes back to the system after each batch, and comes again as a
    page fault for every 4 kB: a third of the time in which ``moesaic predict`` scores rows of Census-Income by its MMoE
    (12.8 instead of 19.3 us per row, 4,096 rows per step, one thread of an AMD EPYC).
    """
    if not supported():
        return
    with contextlib.suppress(AttributeError, OSError):  # another C library
        libc = ctypes.CDLL(None)
        for option in (_TRIM_THRESHOLD, _MMAP_THRESHOLD):
            libc.mallopt(option, size)


class Pool:
    """The free buffers and those in use. Together they are at most twice the peak use."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget all buffers; buffers in use are freed when they return."""
        self.free: list[mmap.mmap] = []  # the one freed last comes last
        self.num_free = self.num_out = self.most_out = 0  # bytes
        self._returned: deque[mmap.mmap] = deque()
        self._lock = threading.Lock()

    def take(self, size: int) -> memoryview:
        """Return at least ``size`` bytes of any content. They come back when the view and its shares are gone."""
        size = _rounded(size)
        with self._lock:
            self._collect()
            memory = self._find(size)
            self.num_out += size
            self.most_out = max(self.most_out, self.num_out)
        if memory is None:
            memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            memory.madvise(mmap.MADV_HUGEPAGE)
        view = memoryview(memory)
        # Not under the lock: a view may be collected anywhere, also while this thread holds it.
        weakref.finalize(view, self._returned.append, memory).atexit = False
        return view

    def _find(self, size: int) -> mmap.mmap | None:
        for i in reversed(range(len(self.free))):
            if len(self.free[i]) == size:
                self.num_free -= size
                return self.free.pop(i)
        return None

    def _collect(self) -> None:
        while self._returned:
            memory = self._returned.popleft()
            memory.madvise(mmap.MADV_FREE)
            self.free.append(memory)
            self.num_out -= len(memory)
            self.num_free += len(memory)
        while self.num_free > self.most_out:
            self.num_free -= len(self.free.pop(0))


def _rounded(size: int) -> int:
    """Round ``size`` up to whole pages, by an eighth at most: batches of nearly equal length share their buffers."""
    step = max(_PAGE, 1 << (size.bit_length() - 4))
    return -(-size // step) * step


_POOL = Pool()
if hasattr(os, "register_at_fork"):
    # Buffers in use belong to the parent's pages, and another thread may have held the lock.
    os.register_at_fork(after_in_child=_POOL.clear)


def new_empty(like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """Return ``like.new_empty(shape, dtype=dtype)``, in kept memory if it is a CPU tensor of 4 MB or more."""
    dtype = dtype or like.dtype
    count = torch.Size(shape).numel()
    if not supported() or count * dtype.itemsize < SMALLEST or like.device.type != "cpu":
        return like.new_empty(shape, dtype=dtype)
    return torch.frombuffer(_POOL.take(count * dtype.itemsize), dtype=dtype, count=count).view(shape)
