"""One way to start a kernel: on the card, in the interpreter, or noted down for benchmarks/compile_kernels.py."""

from __future__ import annotations

import contextlib
import importlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .environment import card
from .tuning import Tile, block_k, tiles, tuner

FUSED = {"enable_fp_fusion": True}
"""A product and a sum are rounded once. The default depends on Triton's version and environment, and 3.9 warns."""


@dataclass(frozen=True)
class Launch:
    """One start of one kernel.

    Attributes:
        kernel: "file.function" below ``jit``.
        args: tensors and integers, in the order of the kernel's parameters.
        constants: values that are compiled in, tile aside.
        grid: number of programs to start, given the tile.
        tile: the kernel's name in ``tuning``, its shape (experts, width summed over or rows of the result, columns of
            the result), the dtype of the matmuls and the mean rows of an expert; None if nothing is tuned.
        warps: warps of a program if nothing is tuned.
    """

    kernel: str
    args: Sequence[Any]
    constants: dict[str, Any]
    grid: Callable[[Tile | None], int]
    tile: tuple[str, tuple[int, int, int], torch.dtype, float] | None = None
    warps: int = 4

    def options(self, tile: Tile | None) -> dict[str, Any]:
        """Return the constants and compiler options with this tile."""
        options = {**self.constants, **FUSED}
        if tile is None or self.tile is None:
            return {**options, "num_warps": self.warps}
        kernel, shape, dtype, _ = self.tile
        options |= {**tile.options(), "BLOCK_K": block_k(dtype), "EVEN_N": shape[2] % tile.n == 0}
        options["UNIT_N"] = math.gcd(shape[2], 16)
        if kernel == "weight_grad":
            return {**options, "EVEN_M": shape[1] % tile.m == 0, "UNIT_M": math.gcd(shape[1], 16)}
        return {**options, "GROUP": tile.group, "UNIT_K": math.gcd(shape[1], 16)}

    def tiles(self) -> tuple[Tile | None, ...]:
        """Return the tiles that tuning may choose from."""
        return (None,) if self.tile is None else tiles(self.tile[0], self.tile[1][1:], self.tile[2], self.tile[3])

    def flags(self) -> tuple[str, ...]:
        """Return the key of launches of one shape: the constants that are on, and the words among them."""
        constants = self.constants.items()
        return tuple(name if on is True else on for name, on in constants if on is True or isinstance(on, str))

    def start(self, tile: Tile | None) -> None:
        jit_function(self.kernel)[(self.grid(tile),)](*self.args, **self.options(tile))

    def run(self) -> None:
        """Start the kernel with the best tile, on the card of its tensors."""
        if _WRITTEN_DOWN is not None:
            _WRITTEN_DOWN.append(self)
            return
        tensors = [a for a in self.args if isinstance(a, Tensor)]
        device = tensors[0].device
        if not all(t.is_contiguous() for t in tensors):  # kernels know no strides
            raise AssertionError(f"a tensor for the kernel {self.kernel} is not contiguous")
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            if self.tile is None:
                self.start(None)
            else:
                kernel, shape, dtype, rows = self.tile
                self.start(tuner(_card_name(device)).choose(kernel, shape, self.flags(), dtype, rows, self.start))


def fastest(key: str, device: torch.device, runs: Mapping[str, Callable[[], Any]]) -> str:
    """Return the name of the fastest of ``runs`` on a card, measured once and kept as the tiles are.

    The first is the default, if nothing can be measured.
    """
    with torch.cuda.device(device):
        return tuner(_card_name(device)).pick(key, tuple(runs), lambda name: runs[name]())


_WRITTEN_DOWN: list[Launch] | None = None


@contextlib.contextmanager
def written_down() -> Iterator[list[Launch]]:
    """Collect the launches inside the block, and run none. Their tensors may be on the meta device."""
    global _WRITTEN_DOWN
    before, _WRITTEN_DOWN = _WRITTEN_DOWN, []
    try:
        yield _WRITTEN_DOWN
    finally:
        _WRITTEN_DOWN = before


def dense(*tensors: Tensor | None) -> list[Any]:
    """Return each tensor contiguous, as a copy if it must be: kernels know no strides."""
    return [None if t is None else t.contiguous() for t in tensors]


def jit_function(kernel: str) -> Any:
    module, name = kernel.split(".")
    return getattr(importlib.import_module(f"{__package__}.jit.{module}"), name)


@cache
def _card_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@cache
def _multiprocessors(index: int) -> tuple[int, int]:
    """Return the number of multiprocessors of a card and the bytes of shared memory of each."""
    known = torch.cuda.get_device_properties(index)
    return known.multi_processor_count, known.shared_memory_per_multiprocessor


def programs(total: int, like: Tensor, tile: Tile, matrices: int = 1) -> int:
    """Return how many programs walk ``total`` tiles.

    On Hopper and later it is as many as fit on the card at a time, which saves starts; on older cards one for each
    tile. Each stage of a program's loads takes shared memory for a part of the rows and of the weights, and CUDA keeps
    1 KB more: 128 x 256 in 3 stages of 64 half-precision numbers takes 3 * (128 + 256) * 64 * 2 = 147,456 bytes, and
    one such program has room in Hopper's 233,472. Two are enough.

    Args:
        total: number of tiles.
        like: tensor of the matmuls' dtype and device.
        tile: way in which the launch is cut up.
        matrices: weights that a program multiplies with at a time.
    """
    if like.device.type != "cuda" or card(like.device) < (9, 0):
        return total
    index = torch.cuda.current_device() if like.device.index is None else like.device.index
    number, memory = _multiprocessors(index)
    own = tile.stages * (tile.m + matrices * tile.n) * block_k(like.dtype) * like.dtype.itemsize + 1024
    return min(total, min(max(memory // own, 1), 2) * number)


def power_of_two(n: int) -> int:
    """Return the least power of two that is not below ``n``."""
    return 1 << max(n - 1, 0).bit_length()
