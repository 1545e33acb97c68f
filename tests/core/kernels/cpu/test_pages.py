"""Large buffers come from memory that was used before, never from memory that is still in use."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from places import ROOT

import core
from core.kernels.cpu import pages

SMAPS = Path("/proc/self/smaps")
MB = 1 << 20

pytestmark = pytest.mark.skipif(not pages.supported(), reason="buffers are kept on Linux alone")


@pytest.fixture
def pool(monkeypatch) -> pages.Pool:
    fresh = pages.Pool()
    monkeypatch.setattr(pages, "_POOL", fresh)
    return fresh


def buffer(megabytes: float, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    return pages.new_empty(torch.empty(0, dtype=dtype), (int(megabytes * MB) // dtype.itemsize,))


def advised(address: int) -> bool:
    """Return whether the mapping that holds ``address`` carries the flag of MADV_HUGEPAGE."""
    inside = False
    for line in SMAPS.read_text().splitlines():
        head = line.split()[0]
        if not head.endswith(":"):
            low, high = (int(bound, 16) for bound in head.split("-"))
            inside = low <= address < high
        elif inside and head == "VmFlags:":
            return "hg" in line.split()
    raise AssertionError(f"no mapping holds {address:#x}")


@pytest.mark.skipif(not SMAPS.exists() or "VmFlags" not in SMAPS.read_text(), reason="no such pages here")
def test_large_pages_are_asked_for(pool) -> None:
    assert advised(buffer(64).data_ptr() + 32 * MB)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_buffer_is_what_torch_would_give(pool, dtype) -> None:
    like = torch.empty(2, 3, dtype=dtype)
    for actual in (pages.new_empty(like, (3, 1 << 20)), pages.new_empty(like, (3, 1 << 20), torch.float32)):
        assert actual.shape == (3, 1 << 20)
        assert actual.is_contiguous()
        assert (actual.fill_(7) == 7).all()
    assert actual.dtype == torch.float32
    assert pages.new_empty(like, (0, 5)).shape == (0, 5)


def test_the_memory_of_a_freed_buffer_is_used_again_by_one_of_about_its_size(pool) -> None:
    first = buffer(64)
    place = first.data_ptr()
    del first
    other = buffer(32)
    assert other.data_ptr() != place
    again = buffer(63.5)
    assert again.data_ptr() == place
    assert (pool.num_out, pool.num_free) == (96 * MB, 0)


@pytest.mark.parametrize("hold", [lambda t: t[5:9], lambda t: t.view(-1, 2), lambda t: t.detach(), lambda t: t.numpy()])
def test_memory_that_anything_still_reads_is_not_used_again(pool, hold) -> None:
    first = buffer(16).fill_(3)
    place, held = first.data_ptr(), hold(first)
    del first
    assert buffer(16).fill_(4).data_ptr() != place
    assert int(held.sum()) == 3 * (4 if held.shape == (4,) else 16 * MB)
    del held
    buffer(16)  # the one of 4s, which was freed first, or this
    assert pool.num_out + pool.num_free == 32 * MB


def test_small_buffers_are_left_to_torch(pool) -> None:
    small = buffer(4 - 1e-6)
    assert small.numel() == 4 * MB - 2
    assert (pool.num_out, pool.num_free) == (0, 0)


def test_no_more_is_kept_than_was_out_at_once(pool) -> None:
    for megabytes in (16, 18, 20, 22, 24, 26):
        buffer(megabytes)
    buffer(8)
    assert pool.most_out == 26 * MB
    assert pool.num_free <= pool.most_out
    assert pool.num_free == sum(len(memory) for memory in pool.free)
    assert [len(memory) for memory in pool.free] == [26 * MB]


def test_sizes_are_an_eighth_larger_at_most() -> None:
    for size in (4 * MB, 4 * MB + 1, 33 * MB, 100 * MB + 5, 1 << 30):
        assert size <= pages._rounded(size) <= max(size * 1.125, size + 2 * MB)
        assert pages._rounded(size) % (2 * MB) == 0


def test_a_forked_process_does_not_write_into_its_parent_s_buffers() -> None:
    of_parent = buffer(8).fill_(1)
    place = of_parent.data_ptr()
    del of_parent
    child = os.fork()
    if child == 0:
        fresh = pages._POOL.free == []
        os._exit(0 if fresh and int(buffer(8).fill_(2).sum()) == 16 * MB else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert buffer(8).data_ptr() == place


def test_gradients_that_are_kept_are_not_written_over_by_the_next_step(pool) -> None:
    torch.manual_seed(0)
    moe = core.MoEConfig(8, core.TokenChoice(top_k=2), core.FFN(hidden_dim=512), backend="cpu").build(256)
    x = torch.randn(2, 1, 30, 256)
    moe(x[0]).sum().backward()
    first, copy = moe.experts.w_in.grad, moe.experts.w_in.grad.clone()
    assert pool.num_out == 2 * 8 * 256 * 512 * 4  # of both matrices, taken by autograd as they are
    moe.zero_grad()
    moe(x[1]).sum().backward()
    assert torch.equal(first, copy)
    assert not torch.equal(moe.experts.w_in.grad, copy)
    second = moe.experts.w_in.grad.data_ptr()
    del first
    moe.zero_grad()
    moe(x[0]).sum().backward()
    torch.testing.assert_close(moe.experts.w_in.grad, copy)
    assert second in {moe.experts.w_in.grad.data_ptr(), moe.experts.w_out.grad.data_ptr()} or pool.free
    moe(x[0]).sum().backward()  # accumulated
    torch.testing.assert_close(moe.experts.w_in.grad, 2 * copy)


_FAULTS = """
import resource
import torch
from core.kernels.cpu import keep_freed

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        torch.ones(16 << 20)  # 64 MB, which glibc gives back to the system as a rule
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

unkept = faults()
keep_freed()
faults()
print(unkept, faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_memory_is_kept():
    done = subprocess.run([sys.executable, "-c", _FAULTS], capture_output=True, text=True, check=True, cwd=ROOT)
    unkept, kept = map(int, done.stdout.split())
    assert 100 * kept < unkept  # 65,571 and 0 where pages have 4 kB
