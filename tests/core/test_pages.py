"""The advice reaches the system, and only for large buffers."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest
import torch

from core.kernels import pages

SMAPS = Path("/proc/self/smaps")


def advised(address: int) -> bool:
    """Whether the mapping that holds ``address`` carries the flag of MADV_HUGEPAGE."""
    inside = False
    for line in SMAPS.read_text().splitlines():
        head = line.split()[0]
        if not head.endswith(":"):
            low, high = (int(bound, 16) for bound in head.split("-"))
            inside = low <= address < high
        elif inside and head == "VmFlags:":
            return "hg" in line.split()
    raise AssertionError(f"no mapping holds {address:#x}")


@pytest.mark.skipif(
    pages._LIBC is None or not SMAPS.exists() or "VmFlags" not in SMAPS.read_text(), reason="no such pages here"
)
def test_a_large_buffer_is_advised() -> None:
    buffer = torch.empty(64 << 20, dtype=torch.uint8)
    assert pages.large_pages(buffer) is buffer
    assert advised(buffer.data_ptr() + buffer.numel() // 2)
    buffer.fill_(7)
    assert int(buffer.sum()) == 7 * (64 << 20)


def test_a_small_or_empty_buffer_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    class Libc:
        @staticmethod
        def madvise(start, length, advice) -> None:
            calls.append(length.value)

    monkeypatch.setattr(pages, "_LIBC", Libc)
    pages.large_pages(torch.empty(0))
    pages.large_pages(torch.empty((4 << 20) - 1, dtype=torch.uint8))
    assert calls == []
    # A view into the middle: the pages at its ends are another's too.
    pages.large_pages(torch.empty(9 << 20, dtype=torch.uint8)[3 : 3 + (8 << 20)])
    assert len(calls) == 1
    assert (8 << 20) - 2 * mmap.PAGESIZE < calls[0] < 8 << 20
