"""Large pages for large buffers.

The weight gradients of a layer are E times as large as a dense layer's share of the work, and each step asks the system
for them anew. In pages of 4 kB that costs up to 2 us a page: a quarter of a training step at E=32. Linux gives pages of
2 MB to memory for which they are asked; elsewhere nothing is done.
"""

from __future__ import annotations

import ctypes
import mmap
import sys

from torch import Tensor

_LARGE = 2 << 20
_SMALLEST = 2 * _LARGE
_ADVICE = getattr(mmap, "MADV_HUGEPAGE", None)
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" and _ADVICE is not None else None


def large_pages(buffer: Tensor) -> Tensor:
    """``buffer``, a contiguous CPU tensor not yet written to, with large pages asked for where it is 4 MB or more.

    Advice only: where the system does not follow it, all is as before.
    """
    size = buffer.numel() * buffer.element_size()
    if _LIBC is None or size < _SMALLEST:
        return buffer
    # Only pages that are wholly the buffer's.
    start = -(-buffer.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (buffer.data_ptr() + size - start) // mmap.PAGESIZE * mmap.PAGESIZE
    _LIBC.madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), _ADVICE)
    return buffer
