"""Memory-mapped arrays in a folder, as encoded data lie on the disk.

One row of a table is one row of a matrix, so a batch is one indexed read a matrix. ``manifest.json`` lists the files
with their sizes: a file that was cut is noticed before it is mapped.
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
    """A folder that is not what its manifest says; the message is the reason."""


class ArrayFiles:
    """The arrays of one folder, mapped into memory and read only.

    It can be sent to another process, which maps the files anew.

    Args:
        folder: as `ArrayWriter` left it.

    Attributes:
        info: what was given to ``ArrayWriter.finish``: plain values.

    Raises:
        Damaged: a file is missing, or has not the size that it was written with.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            manifest = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
            arrays, sizes, self.info = manifest["arrays"], manifest["sizes"], manifest["info"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise Damaged(f"{_MANIFEST} cannot be read") from error
        for name, size in sizes.items():
            path = folder / name
            found = path.stat().st_size if path.is_file() else None
            if found != size:
                raise Damaged(f"{name} is missing" if found is None else f"{name} has {found} bytes, not {size}")
        self._arrays = {name: _map(folder / f"{name}.bin", shape, dtype) for name, (shape, dtype) in arrays.items()}

    def __contains__(self, name: str) -> bool:
        return name in self._arrays

    def __getitem__(self, name: str) -> Tensor:
        return self._arrays[name]

    def __reduce__(self) -> tuple[Any, ...]:
        return ArrayFiles, (self.folder,)


def _map(path: Path, shape: list[int], dtype: str) -> Tensor:
    if 0 in shape:
        return torch.from_numpy(np.empty(shape, dtype))
    if hasattr(os, "posix_fadvise"):  # rows are read in any order: ask for the file before they are
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
    # Copy on write, since torch wants memory that could be written; nothing writes, so nothing is copied.
    return torch.from_numpy(np.asarray(np.memmap(path, dtype=dtype, mode="c", shape=tuple(shape))))


class ArrayWriter:
    """Write arrays into an empty folder; ``close`` writes the manifest, without which the folder counts as damaged."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._arrays: dict[str, tuple[list[int], str]] = {}
        self._open: list[np.memmap[Any, Any]] = []
        self._info: Any = None

    def create(self, name: str, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """An array to be filled."""
        kind = np.dtype(dtype)
        self._arrays[name] = (list(shape), kind.str)
        path = self.folder / f"{name}.bin"
        size = int(np.prod(shape, dtype=np.int64)) * kind.itemsize
        with open(path, "wb") as file:
            if size == 0:
                return np.empty(shape, kind)
            # Without its blocks, a full disk would be a fatal signal at some later write.
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
        array = np.memmap(path, dtype=kind, mode="r+", shape=shape)
        self._open.append(array)
        return array

    def save(self, name: str, array: NDArray[Any]) -> None:
        """Write a whole array."""
        self.create(name, array.shape, array.dtype)[...] = array

    def finish(self, info: Any) -> None:
        """The folder is complete; ``info`` are plain values to keep beside the arrays."""
        self._info = info

    def close(self) -> None:
        """Write the arrays and the manifest to the disk."""
        assert self._info is not None, "finish() comes first"
        for array in self._open:
            array.flush()
        self._open.clear()
        sizes = {path.name: path.stat().st_size for path in sorted(self.folder.iterdir())}
        with replacing(self.folder / _MANIFEST) as file:
            json.dump({"arrays": self._arrays, "sizes": sizes, "info": self._info}, file)


class ArraysInMemory:
    """Arrays in memory, to be filled like those of a ``ArrayWriter`` and read like those of ``ArrayFiles``.

    Attributes:
        info: what was given to ``finish``.
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
        """Keep plain values beside the arrays."""
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
