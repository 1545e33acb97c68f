"""Blocks of rows of one expert, and sums over them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..eager import accumulate_dtype
from .pages import new_empty
from .products import addmm_, is_served_badly, mm

BLOCK = 512
TILE = 32


def is_half(dtype: torch.dtype) -> bool:
    return accumulate_dtype(dtype) != dtype


def row_tile(dtype: torch.dtype) -> int:
    return TILE if is_half(dtype) or (dtype == torch.float32 and is_served_badly()) else 1


class Block(NamedTuple):
    """The rows ``start`` to ``end`` of one expert; matmuls run up to ``stop``, the end rounded up to the tile."""

    expert: int
    start: int
    end: int
    stop: int
    first: bool
    last: bool


def cut_in_blocks(ends: list[int], dtype: torch.dtype) -> list[Block]:
    """Cut each expert's rows into equal blocks, in the order of the rows."""
    # As many bytes in half precision as in full: a block is to stay in cache.
    block_rows, tile = 2 * BLOCK if is_half(dtype) else BLOCK, row_tile(dtype)
    blocks, begin = [], 0
    for e, end in enumerate(ends):
        rows = end - begin
        count = max(1, round(rows / block_rows)) if rows else 0
        for i in range(count):
            start, stop = begin + rows * i // count, begin + rows * (i + 1) // count
            blocks.append(Block(e, start, stop, start - (start - stop) // tile * tile, i == 0, i == count - 1))
        begin = end
    return blocks


class RowSum:
    """Adds gated rows to their tokens, in the accumulating dtype."""

    def __init__(self, like: Tensor, width: int, blocks: list[Block]) -> None:
        self.dtype = like.dtype
        self.y = new_empty(like, (like.shape[0], width), accumulate_dtype(like.dtype)).zero_()
        longest = max((b.end - b.start for b in blocks), default=0)
        # One buffer for all blocks stays in cache and is not asked of the system again and again.
        self.buffer = None if self.y.dtype == like.dtype else self.y.new_empty(longest, width)

    def add(self, index: Tensor | None, start: int, end: int, y_b: Tensor, gates: Tensor) -> None:
        y_b = torch.mul(y_b, gates, out=y_b if self.buffer is None else self.buffer[: end - start])
        if index is None:
            self.y[start:end] = y_b
        else:
            self.y.index_add_(0, index[start:end], y_b)

    def result(self) -> Tensor:
        return self.y.to(self.dtype)


class WeightGrad:
    """The gradient of a stacked weight, expert by expert; experts without rows get zeros."""

    def __init__(self, like: Tensor | None, empty: Tensor) -> None:
        if like is None:
            self.dw = empty
        else:  # with the strides of its weight: else torch would copy it
            self.dw = new_empty(like, like.shape) if like.is_contiguous() else torch.empty_like(like)
        self.begun = 0  # experts written so far
        # Adding up blocks in half precision would round each time.
        half = like is not None and is_half(like.dtype)
        self.sum = torch.empty_like(like[0], dtype=torch.float32) if like is not None and half else None

    def add(self, block: Block, left: Tensor, right: Tensor) -> None:
        if self.dw.ndim != 3:  # not wanted
            return
        dw = self.dw[block.expert]
        self.dw[self.begun : block.expert].zero_()
        self.begun = block.expert + 1
        if (block.first and block.last) or self.sum is None:
            mm(left.t(), right, out=dw) if block.first else addmm_(dw, left.t(), right)
            return
        part = left.t() @ right
        self.sum.copy_(part) if block.first else self.sum.add_(part)
        if block.last:
            dw.copy_(self.sum)

    def result(self) -> Tensor:
        if self.dw.ndim == 3:
            self.dw[self.begun :].zero_()
        return self.dw
