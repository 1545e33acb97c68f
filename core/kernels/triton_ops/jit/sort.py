"""A stable counting sort of the pairs: counts by block, a sum over them (``torch.cumsum``), places."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _pair(n, Served, T, K, ORDERED: tl.constexpr, IN_QUEUE: tl.constexpr, live):
    """Return the n-th pair: n itself, or, ``IN_QUEUE``, the (n // T)-th choice of the (n % T)-th token served."""
    if IN_QUEUE:
        token = (n % T).to(tl.int64)
        if ORDERED:
            token = tl.load(Served + token, mask=live, other=0)
        return token * K + n // T
    return n.to(tl.int64)


@triton.jit(do_not_specialize=["N", "T", "bins", "blocks"])
def count(
    Ids,
    Served,
    Counts,
    N,
    T,
    K,
    bins,
    blocks,
    ORDERED: tl.constexpr,
    IN_QUEUE: tl.constexpr,
    BLOCK: tl.constexpr,
    BINS_POW2: tl.constexpr,
):
    """Count how often each id occurs in each block of pairs: Ids int64 (N,) in ``range(bins)``, Counts int32 (bins,
    blocks)."""
    block = tl.program_id(0)
    n = block * BLOCK + tl.arange(0, BLOCK)
    live = n < N
    ids = tl.load(Ids + _pair(n, Served, T, K, ORDERED, IN_QUEUE, live), mask=live, other=0)
    # Entries past the last pair go to a bin that is not kept.
    in_block = tl.histogram(tl.where(live, ids, bins).to(tl.int32), BINS_POW2)
    b = tl.arange(0, BINS_POW2)
    tl.store(Counts + b.to(tl.int64) * blocks + block, in_block, mask=b < bins)


@triton.jit(do_not_specialize=["N", "T", "blocks"])
def place(
    Ids,
    Served,
    Ends,
    Places,
    Order,
    N,
    T,
    K,
    blocks,
    ORDERED: tl.constexpr,
    IN_QUEUE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Find the positions of pairs sorted by id, earlier ones first; ``IN_QUEUE`` only among pairs of the same id.

    Ends int32 (bins, blocks): the pairs of lower ids, and of the same id up to the end of the block. Places int64 (N,);
    Order int64 (N,), the pair at each place, not ``IN_QUEUE``.
    """
    block = tl.program_id(0)
    n = block * BLOCK + tl.arange(0, BLOCK)
    live = n < N
    pair = _pair(n, Served, T, K, ORDERED, IN_QUEUE, live)
    ids = tl.load(Ids + pair, mask=live, other=-1)
    m = block * BLOCK + tl.arange(0, BLOCK)
    others = tl.load(Ids + _pair(m, Served, T, K, ORDERED, IN_QUEUE, m < N), mask=m < N, other=-2)
    earlier = (others[None, :] == ids[:, None]) & (m[None, :] < n[:, None])
    before = tl.sum(earlier.to(tl.int32), 1)
    # The end of what comes before: of the block before, or of the id before's last block.
    at = ids * blocks + block - 1
    start = tl.load(Ends + at, mask=live & (at >= 0), other=0)
    if IN_QUEUE:
        start -= tl.load(Ends + ids * blocks - 1, mask=live & (ids > 0), other=0)
        tl.store(Places + pair, (start + before).to(tl.int64), mask=live)
    else:
        tl.store(Places + pair, (start + before).to(tl.int64), mask=live)
        tl.store(Order + (start + before), pair, mask=live)
