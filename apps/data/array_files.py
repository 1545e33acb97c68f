"""Memory-mapped arrays in a folder: the form of encoded data on the disk.

One row of a table is one row of a matrix, so a batch is one indexed read a matrix. Each matrix is an ``.npy`` file.
``manifest.json`` lists the files with their sizes: a file that was cut is noticed before it is mapped.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from torch import Tensor

from apps.base.files import replacing

_MANIFEST = "manifest.json"


class Damaged(Exception):
    """A folder that does not fit its manifest; the message is the reason."""


class ArrayFiles:
    """The arrays of one folder, mapped into memory and read only.

    It can be sent to another process, which maps the files again.

    Args:
        folder: the folder of an `ArrayWriter` that was closed.

    Attributes:
        info: the plain values that ``ArrayWriter.finish`` got.

    Raises:
        Damaged: a file is missing, or has not the size that it was written with.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
            sizes, self.info = manifest["sizes"], manifest["info"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise Damaged(f"{_MANIFEST} cannot be read") from error
        for name, size in sizes.items():
            path = folder / name
            if not path.is_file():
                raise Damaged(f"{name} is missing")
            if (actual := path.stat().st_size) != size:
                raise Damaged(f"{name} has {actual} bytes, not {size}")
        self._arrays = {Path(name).stem: _map(folder / name) for name in sizes}

    def __contains__(self, name: str) -> bool:
        return name in self._arrays

    def __getitem__(self, name: str) -> Tensor:
        return self._arrays[name]

    def __reduce__(self) -> tuple[Any, ...]:
        return ArrayFiles, (self.folder,)


def _map(path: Path) -> Tensor:
    if hasattr(os, "posix_fadvise"):  # rows are read in any order: ask for the file before they are
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
    # Copy on write, since torch wants memory that could be written; nothing writes, so nothing is copied.
    return torch.from_numpy(np.asarray(np.load(path, mmap_mode="c")))


class ArrayWriter:
    """Write arrays into an empty folder; ``close`` writes the manifest, without which the folder counts as damaged."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: dict[str, np.memmap[Any, Any]] = {}
        self._info: Any = None

    def create(self, name: str, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """Return an array to be filled."""
        path = self.folder / f"{name}.npy"
        array = np.lib.format.open_memmap(path, "w+", np.dtype(dtype), shape)
        # Without its blocks, a full disk would be a fatal signal at some later write.
        if hasattr(os, "posix_fallocate"):
            with open(path, "r+b") as file:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
        self._open[name] = array
        return array

    def save(self, name: str, array: NDArray[Any]) -> None:
        """Write a whole array."""
        self.create(name, array.shape, array.dtype)[...] = array

    def __contains__(self, name: str) -> bool:
        return name in self._open

    def __getitem__(self, name: str) -> Tensor:
        """Return an array as it is so far; it shares memory with the file."""
        return torch.from_numpy(self._open[name])

    def finish(self, info: Any) -> None:
        """Take plain values to keep with the arrays, which are complete."""
        self._info = info

    def close(self) -> None:
        """Write the arrays and the manifest to the disk."""
        assert self._info is not None, "finish() comes first"
        for array in self._open.values():
            array.flush()
        self._open.clear()
        sizes = {path.name: path.stat().st_size for path in sorted(self.folder.iterdir())}
        with replacing(self.folder / _MANIFEST) as file:
            json.dump({"sizes": sizes, "info": self._info}, file)


class ArraysInMemory:
    """Arrays in memory, filled like an ``ArrayWriter``'s and read like ``ArrayFiles``'.

    Attributes:
        info: the plain values that ``finish`` got.
    """

    def __init__(self) -> None:
        self._arrays: dict[str, NDArray[Any]] = {}
        self.info: Any = None

    def create(self, name: str, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """Return an array to be filled."""
        self._arrays[name] = np.empty(shape, dtype)
        return self._arrays[name]

    def save(self, name: str, array: NDArray[Any]) -> None:
        """Take a whole array; it is not copied."""
        self._arrays[name] = array

    def finish(self, info: Any) -> None:
        """Keep plain values with the arrays."""
        self.info = info

    def __contains__(self, name: str) -> bool:
        return name in self._arrays

    def __getitem__(self, name: str) -> Tensor:
        return torch.from_numpy(self._arrays[name])


def save_texts(writer: ArrayWriter | ArraysInMemory, name: str, texts: Iterable[str]) -> None:
    """Write texts as two arrays: their UTF-8 bytes, and the N + 1 bounds of each in them."""
    data = [text.encode() for text in texts]
    writer.save(f"{name}_bytes", np.frombuffer(b"".join(data), np.uint8))
    writer.save(f"{name}_bounds", np.cumsum([0, *map(len, data)], dtype=np.int64))


def read_texts(arrays: ArrayFiles | ArraysInMemory, name: str) -> list[str]:
    """Return the texts that ``save_texts`` wrote."""
    data = arrays[f"{name}_bytes"].numpy().tobytes()
    return [data[a:b].decode() for a, b in itertools.pairwise(arrays[f"{name}_bounds"].tolist())]
