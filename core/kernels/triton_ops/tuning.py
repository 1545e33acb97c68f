"""The tiles that a kernel may run in, and the choice among them.

Nothing here changes a bit of a result: tiles differ in rows, columns, warps and stages, and every sum runs over
``BLOCK_K`` numbers at a time from first to last. ``hidden_grad`` sums along a row inside its tile, so its tile is not
tuned: only shapes decide it.

So may backends be measured (``launch.fastest``), whose results differ in rounding.

The best tile of a shape is measured when it is first met, and written to a file of the card and the versions
(``MOESAIC_TUNING_CACHE``; ``~/.cache/moesaic/tuning``). Shapes differ by powers of two of the rows an expert
has and by the widths; more than ``MAX_SHAPES`` of them take the default. ``MOESAIC_TUNE=0`` measures nothing, and
nothing is measured while a CUDA graph is captured.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from .environment import interpreted

C = TypeVar("C", "Tile", str)
MAX_SHAPES = 256
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tile:
    """The way in which one launch is cut up.

    Attributes:
        m, n: rows and columns of an output tile.
        warps: warps of a program.
        stages: stages of its pipeline of loads.
        group: row tiles that run side by side over the same columns.
    """

    m: int
    n: int
    warps: int
    stages: int
    group: int = 8

    def options(self) -> dict[str, int]:
        return {"BLOCK_M": self.m, "BLOCK_N": self.n, "num_warps": self.warps, "num_stages": self.stages}


# Half precision on tensor cores. If a tile ends in an activation, its registers limit the tile.
PLAIN = (
    Tile(128, 256, 8, 3),
    Tile(128, 128, 8, 3),
    Tile(64, 256, 8, 3),
    Tile(64, 128, 4, 4),
    Tile(32, 128, 4, 4),
    Tile(16, 128, 4, 4),
)
ACTIVATED = PLAIN[1:]
TWO_SUMS = (
    Tile(128, 64, 8, 4),
    Tile(64, 128, 8, 4),
    Tile(64, 64, 4, 4),
    Tile(32, 64, 4, 4),
    Tile(16, 64, 4, 4),
)
# GELU's error function takes more registers than SiLU.
TWO_SUMS_OF_SILU = (Tile(128, 128, 8, 3), *TWO_SUMS)
# Unpacking int8 and int4 takes registers and shared memory: with Triton 3.9 on sm_80, ``linear`` spills 280 bytes with
# 128 x 256, and 64 x 128 of two sums in 4 stages needs 188 KB.
TWO_QUANTIZED_SUMS = tuple(replace(t, stages=3) if t == Tile(64, 128, 8, 4) else t for t in TWO_SUMS)
# A row's sum lies within a tile: warps and columns fixed for each height.
FIXED = (Tile(128, 128, 8, 3), Tile(64, 128, 8, 3), Tile(32, 64, 4, 3), Tile(16, 64, 4, 3))
# The weights' gradients: their tiles cover the weight, their sums the rows.
SQUARE = (Tile(128, 256, 8, 3), Tile(128, 128, 8, 3), Tile(128, 128, 4, 4), Tile(64, 128, 4, 4), Tile(64, 64, 4, 4))
# Full precision without tf32 runs on the ordinary cores, whose sums lie in registers.
FULL = (Tile(64, 64, 8, 3), Tile(64, 64, 4, 3), Tile(32, 64, 4, 3), Tile(16, 64, 4, 3))
FULL_FIXED = (Tile(64, 64, 8, 3), Tile(32, 64, 4, 3), Tile(16, 64, 4, 3))
FULL_SQUARE = (Tile(64, 64, 8, 3), Tile(64, 64, 4, 3))
# Two sums of int8 spill 304 bytes with 64 x 64 on sm_90, and 320 with 32 x 64 and 4 warps.
FULL_QUANTIZED_SUMS = (Tile(32, 64, 8, 3), Tile(16, 64, 4, 3))
# Half-precision rows that are not a multiple of 16 bytes are loaded 2, 4 or 8 bytes at a time, and each address, kept
# over the whole sum, takes two registers: on sm_80 ``linear`` spilled 1768 bytes per thread with 128 x 256, none with
# these.
RAGGED = FULL_FIXED
RAGGED_SQUARE = FULL_SQUARE[:1]
# Small, so that small problems have many tiles, ragged ones too.
INTERPRETED = (Tile(32, 32, 4, 1, 2),)

HALF_TILES = {
    "up": ACTIVATED,
    "up_geglu": TWO_SUMS,
    "up_swiglu": TWO_SUMS_OF_SILU,
    "up_geglu_quantized": TWO_QUANTIZED_SUMS,
    "up_swiglu_quantized": TWO_QUANTIZED_SUMS,
    "linear": PLAIN,
    "linear_quantized": PLAIN[1:],
    "hidden_grad": FIXED,
    "weight_grad": SQUARE,
}
# Masked along the sum, the largest tiles spill with Triton 3.9: 136 bytes of ``linear`` on sm_80, none with 3.7, and
# 112 of ``up_swiglu`` on sm_100.
UNEVEN_TILES = {**HALF_TILES, "linear": PLAIN[1:], "up_swiglu": TWO_SUMS}
FULL_TILES = {
    # Triton 3.6 spills 208 bytes of ``up`` with 64 x 64 and 4 warps, where 3.7 spills none.
    "up": FULL_FIXED,
    "up_geglu": FULL_FIXED,
    "up_swiglu": FULL_FIXED,
    "up_geglu_quantized": FULL_QUANTIZED_SUMS,
    "up_swiglu_quantized": FULL_QUANTIZED_SUMS,
    "linear": FULL,
    "linear_quantized": FULL_FIXED,
    "hidden_grad": FULL_FIXED,
    "weight_grad": FULL_SQUARE,
}
# On sm_100 ``up`` of int8 spilled 104 bytes with 32 x 64 and 4 warps.
RAGGED_QUANTIZED = tuple(replace(t, warps=8) if t.m == 32 else t for t in RAGGED)
RAGGED_TILES: dict[str, tuple[Tile, ...]] = dict.fromkeys(HALF_TILES, RAGGED)
RAGGED_TILES |= {kernel: RAGGED_QUANTIZED for kernel in HALF_TILES if kernel.endswith("_quantized")}
RAGGED_TILES["weight_grad"] = RAGGED_SQUARE
# The same holds for float32 rows that are not a multiple of 4: on sm_80 ``linear`` spilled 288 bytes with 4 warps, none
# with 8.
FULL_RAGGED = (Tile(64, 64, 8, 3), Tile(32, 64, 8, 3), Tile(16, 64, 4, 3))
FULL_RAGGED_TILES = {
    **FULL_TILES,
    "linear": FULL_RAGGED,
    "linear_quantized": FULL_RAGGED,
    "weight_grad": FULL_SQUARE[:1],
}
TABLES = (HALF_TILES, UNEVEN_TILES, FULL_TILES, RAGGED_TILES, FULL_RAGGED_TILES)


def block_k(dtype: torch.dtype) -> int:
    """Return how many numbers of a sum are taken at a time: it changes the result, and so is never tuned."""
    if interpreted():
        return 16
    return 64 if dtype.itemsize == 2 else 32


def tiles(kernel: str, widths: Sequence[int], dtype: torch.dtype, rows_per_expert: float) -> tuple[Tile, ...]:
    """Return the tiles to try, the default first. None is more than twice as high as an expert has rows.

    Args:
        kernel: a key of ``HALF_TILES``, with "_quantized" if its matrices are.
        widths: widths of the rows that it reads and writes.
        dtype: dtype of the matmuls.
        rows_per_expert: mean rows of an expert.
    """
    if interpreted():
        return INTERPRETED
    ragged, uneven = (any(width % n for width in widths) for n in (16 // dtype.itemsize, block_k(dtype)))
    if dtype.itemsize == 2:
        table = RAGGED_TILES if ragged else UNEVEN_TILES if uneven else HALF_TILES
    else:
        table = FULL_RAGGED_TILES if ragged else FULL_TILES
    known = table[kernel if kernel in table else kernel.removesuffix("_quantized")]
    if kernel == "weight_grad":
        return known
    fitting = tuple(t for t in known if t.m <= max(2 * rows_per_expert, 16)) or known[-1:]
    if kernel == "hidden_grad":
        return fitting[:1]
    # Below 64 rows another tensor-core instruction runs, which may round otherwise: tuning stays on one side.
    tallest = fitting[0].m
    return tuple(t for t in fitting if t.m >= min(tallest, 64))


def key_of(kernel: str, shape: Sequence[Any], flags: Sequence[str], dtype: torch.dtype, rows_per_expert: float) -> str:
    """Return the key that tells measurements apart; rows count by powers of two."""
    height = max(int(rows_per_expert), 1).bit_length()
    return "/".join(map(str, (kernel, str(dtype).removeprefix("torch."), height, *shape, *flags)))


class Tuner:
    """Measures tiles and backends on the kind of card that is named ``card``, and remembers the best of each shape."""

    def __init__(self, card: str) -> None:
        self.card = card
        self.best: dict[str, Tile | str] = {}
        self.file: Path | None = None
        self.loaded = self.full = False

    def choose(
        self,
        kernel: str,
        shape: tuple[int, int, int],
        flags: Sequence[str],
        dtype: torch.dtype,
        rows_per_expert: float,
        run: Callable[[Tile], Any],
    ) -> Tile:
        """Return the tile for this launch.

        Args:
            kernel, dtype, rows_per_expert: as in ``tiles``.
            shape: experts and the two widths.
            flags: ``Launch.flags``.
            run: launches the kernel with a tile, into the buffers of the real launch.
        """
        candidates = tiles(kernel, shape[1:], dtype, rows_per_expert)
        return self.pick(key_of(kernel, shape, flags, dtype, rows_per_expert), candidates, run)

    def pick(self, key: str, candidates: Sequence[C], run: Callable[[C], Any]) -> C:
        """Return the fastest of tiles, or of names of backends, for what ``key`` names; the first is the default."""
        if len(candidates) == 1 or os.environ.get("MOESAIC_TUNE", "1") == "0":
            return candidates[0]
        if not self.loaded:
            self._load()
        known = self.best.get(key)
        if known in candidates:  # a file may be of an older list of tiles
            return candidates[candidates.index(known)]
        if len(self.best) >= MAX_SHAPES:
            if not self.full:
                log.warning("%d shapes are measured on %s: others take the default tile", MAX_SHAPES, self.card)
            self.full = True
            return candidates[0]
        if torch.cuda.is_current_stream_capturing():
            return candidates[0]
        fastest = _fastest(candidates, run)
        if fastest is None and isinstance(candidates[0], Tile):
            return candidates[0]
        # A backend stays the default then: a checkpoint's second pass has to save the same tensors as the first one.
        best = candidates[0] if fastest is None else fastest
        self.best[key] = best
        self._save()
        return best

    def _load(self) -> None:
        import triton

        self.loaded = True
        folder = os.environ.get("MOESAIC_TUNING_CACHE") or Path.home() / ".cache" / "moesaic" / "tuning"
        name = "-".join((self.card, torch.__version__, triton.__version__)).replace(" ", "_")
        self.file = Path(folder) / f"{name.replace('/', '_')}.json"
        self.best = _read(self.file)

    def _save(self) -> None:
        if self.file is None:
            return
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            with _locked(self.file):
                # Other processes have measured since it was read, and their tiles stay.
                self.best = {**_read(self.file), **self.best}
                # Another process may be reading: the file is written next to its place and then moved.
                new = self.file.with_suffix(f".{os.getpid()}.tmp")
                plain = {key: best if isinstance(best, str) else asdict(best) for key, best in self.best.items()}
                try:
                    new.write_text(json.dumps(plain, indent=1))
                    new.replace(self.file)
                finally:
                    new.unlink(missing_ok=True)
        except OSError as error:
            log.warning("measured tiles are not kept: %s cannot be written (%s)", self.file, error)
            self.file = None


def _read(file: Path) -> dict[str, Tile | str]:
    """Return the contents of a file, without tiles of an older list. An unreadable file counts as empty."""
    known = {tile for table in TABLES for listed in table.values() for tile in listed}
    try:
        kept = {k: v if isinstance(v, str) else Tile(**v) for k, v in json.loads(file.read_text()).items()}
        return {key: best for key, best in kept.items() if isinstance(best, str) or best in known}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        log.warning("tiles are measured again: %s cannot be read (%s)", file, error)
        return {}


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Let one process in at a time, by a file next to ``file``. Without such locks (Windows) the last one wins."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    with open(file.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # until it is closed
        yield


def _fastest(candidates: Sequence[C], run: Callable[[C], Any]) -> C | None:
    """Return the fastest one, or None if memory lacks room for the timer's own memory in the middle of a step."""
    from triton.runtime.errors import OutOfResources, PTXASError
    from triton.testing import do_bench

    seconds: dict[C, float] = {}
    for tile in candidates:
        try:
            seconds[tile] = do_bench(partial(run, tile), warmup=5, rep=20, return_mode="median")
        except (OutOfResources, PTXASError):  # of a smaller card
            continue
        except torch.OutOfMemoryError:
            return None
    return min(seconds, key=seconds.__getitem__) if seconds else candidates[-1]


@cache
def tuner(card: str) -> Tuner:
    """Return the tuner of this kind of card: tensors of a process may be on several kinds."""
    return Tuner(card)
