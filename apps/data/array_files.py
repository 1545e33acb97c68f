"""Encoded data on disk: memory-mapped arrays in a folder that is complete or not there.

One row of a table is one row of a matrix, so a batch is one indexed read a matrix. ``manifest.json`` lists the files
with their sizes: a file that was cut is noticed before it is mapped.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import DTypeLike, NDArray
from torch import Tensor

from apps.data.sources import DataError

log = logging.getLogger(__name__)

_MANIFEST = "manifest.json"
_NO_SPACE = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)


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
    """Arrays in a folder beside ``target``, which is moved there when it is complete.

    Use it as ``with ArrayWriter.open(target) as writer``; the block ends with ``writer.finish(info)``, or the folder
    is removed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._arrays: dict[str, tuple[list[int], str]] = {}
        self._open: list[np.memmap[Any, Any]] = []
        self._info: Any = None

    @classmethod
    @contextlib.contextmanager
    def open(cls, target: Path) -> Iterator[ArrayWriter]:
        """A writer for ``target``; the caller holds its lock.

        Raises:
            DataError: the folder cannot be written, or the disk is full.
        """
        partial = None
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            for stale in target.parent.glob(f".{target.name}.*"):  # of a process that was killed
                shutil.rmtree(stale, ignore_errors=True)
            partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
            writer = cls(partial)
            yield writer
            writer._commit(target)
        except OSError as error:
            where = f"{str(target.parent)!r}"
            if error.errno in _NO_SPACE:
                raise DataError(
                    f"no disk space for the encoded data in {where} ({os.strerror(error.errno)}): nothing was kept; "
                    "free some, or set cache_dir (--data.cache_dir) to a folder with more"
                ) from error
            raise DataError(
                f"{where} cannot be written ({error.strerror or error}): set cache_dir (--data.cache_dir) to a folder "
                "that can"
            ) from error
        finally:
            if partial is not None:
                shutil.rmtree(partial, ignore_errors=True)

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

    def _commit(self, target: Path) -> None:
        assert self._info is not None, "the block must end with finish()"
        for array in self._open:
            array.flush()
        self._open.clear()
        sizes = {path.name: path.stat().st_size for path in sorted(self.folder.iterdir())}
        manifest = {"arrays": self._arrays, "sizes": sizes, "info": self._info}
        with open(self.folder / _MANIFEST, "w", encoding="utf-8") as file:
            json.dump(manifest, file)
            file.flush()
            os.fsync(file.fileno())
        self.folder.chmod(0o755)  # mkdtemp makes folders that only their owner can read
        if target.exists():  # a damaged one
            old = target.with_name(f".{target.name}.old")
            os.replace(target, old)
            shutil.rmtree(old, ignore_errors=True)
        os.replace(self.folder, target)


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


def open_or_write(folder: Path, cache: Path, write: Callable[[ArrayWriter], None]) -> ArrayFiles:
    """The arrays of ``folder``, written once, whatever asks at the same time; anew if they are damaged.

    Args:
        folder: below ``cache``; its name changes when what it is made from does.
        cache: the cache's folder, which also holds the locks.
        write: fills the writer and ends with ``writer.finish``.

    Raises:
        DataError: the cache cannot be written, or the disk is full.
    """
    if (files := open_whole(folder)) is not None:
        return files
    from filelock import FileLock

    lock = cache / ".locks" / f"{folder.name}.lock"
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        waiting = FileLock(lock)  # the system drops it when its holder dies
        waiting.acquire()
    except OSError as error:
        raise DataError(
            f"cache_dir={str(cache)!r} cannot be written ({error.strerror or error}): "
            "set cache_dir (--data.cache_dir) to a folder that can"
        ) from error
    try:
        if (files := open_whole(folder)) is not None:  # another process has made it meanwhile
            return files
        log.info("encoding into %s", folder)
        with ArrayWriter.open(folder) as writer:
            write(writer)
        return ArrayFiles(folder)
    finally:
        waiting.release()


def open_whole(folder: Path) -> ArrayFiles | None:
    """The arrays of ``folder``; None where there are none, or they are damaged."""
    if not folder.is_dir():
        return None
    try:
        return ArrayFiles(folder)
    except Damaged as damage:
        log.warning("%s is damaged (%s): it is encoded anew", folder, damage)
        return None
