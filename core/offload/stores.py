"""Where offloaded experts are kept: in host memory, or in a file of safetensors that is read expert by expert."""

from __future__ import annotations

import ctypes
import json
import os
import struct
import threading
import weakref
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol, cast

import torch
from torch import Tensor

DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""The names of dtypes in a file of safetensors."""
_ALIGNED = 64
"""The tensors of a file begin at a multiple of so many bytes, so that a mapped one is aligned for any dtype."""


class Store(Protocol):
    """Keeps the stacked tensors of one module of experts."""

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """The stacked tensors on the CPU, by the names of ``Experts.weights_of``."""

    def load(self, e: int, into: Mapping[str, Tensor]) -> None:
        """Copy expert ``e`` into tensors of one expert, on any device. On CUDA the copy may still be on its way."""

    def check(self) -> None:
        """Raise a ``ValueError`` if the experts differ from the stored ones."""


class HostStore:
    """Stacked tensors in host memory, pinned if a GPU is to read them.

    Args:
        tensors: stacked tensors by name, on any device.
        pinned: whether the memory is pinned.
    """

    def __init__(self, tensors: Mapping[str, Tensor], pinned: bool) -> None:
        self.tensors: dict[str, Tensor] = {}
        for name, t in tensors.items():
            if pinned:
                self.tensors[name] = torch.empty(t.shape, dtype=t.dtype, pin_memory=True).copy_(t.detach())
            else:
                self.tensors[name] = t.detach().cpu()

    def load(self, e: int, into: Mapping[str, Tensor]) -> None:
        for name, row in into.items():
            row.copy_(self.tensors[name][e], non_blocking=True)

    def check(self) -> None:
        """Do nothing: memory of one's own stays as it is."""


class ExpertFile:
    """A file of safetensors with the stacked tensors of several modules, written whole or not at all.

    Reads go by position and not through a mapping: a file that is cut under the cache is then an error and not the end
    of the process. An expert's bytes are compared with the checksum of the written bytes when it is read for the first
    time, and after every change of the file's size or time.

    Args:
        path: the file; an earlier one is replaced.
        tensors: stacked tensors by full name; written expert by expert, so that no second copy is made.

    Raises:
        ValueError: a dtype that safetensors does not have.
        OSError: the file cannot be written.
    """

    def __init__(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        self.path = path
        # The widest dtype first: no tensor then starts in the middle of a number.
        names = sorted(tensors, key=lambda name: -tensors[name].element_size())
        header, self._checksums = {}, {}
        end = 0
        for name in names:
            t = tensors[name]
            if t.dtype not in DTYPES:
                raise ValueError(f"{name} is {t.dtype}, which a file of safetensors cannot hold")
            header[name] = {"dtype": DTYPES[t.dtype], "shape": [*t.shape], "data_offsets": [end, end + t.nbytes]}
            end += t.nbytes
        text = json.dumps({"__metadata__": {"format": "pt"}, **header}, separators=(",", ":")).encode()
        text += b" " * (-(8 + len(text)) % _ALIGNED)
        self._begin = {name: 8 + len(text) + header[name]["data_offsets"][0] for name in names}  # type: ignore[index]
        self.size = 8 + len(text) + end
        temporary = path.with_name(f"{path.name}.{os.urandom(4).hex()}.tmp")
        try:
            with open(temporary, "xb") as file:
                file.write(struct.pack("<Q", len(text)) + text)
                for name in names:
                    self._checksums[name] = [self._write(file, expert) for expert in tensors[name].detach()]
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        self._fd = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._fd)
        self._lock = threading.Lock()
        self._verified: set[tuple[str, int]] = set()
        self._written = self._state = self._look()
        storage = cast(torch.UntypedStorage, torch.UntypedStorage.from_file(str(path), shared=False, nbytes=self.size))
        self.tensors: dict[str, Tensor] = {}
        for name, t in tensors.items():
            strides = torch.empty(t.shape, device="meta").stride()
            view = torch.empty(0, dtype=t.dtype)
            self.tensors[name] = view.set_(storage, self._begin[name] // t.element_size(), t.shape, strides)
        """The tensors as a private mapping of the file: what is written to them does not reach it."""

    @staticmethod
    def _write(file: object, expert: Tensor) -> int:
        """Write one expert's part of a tensor, and return its checksum."""
        data = _bytes_of(expert.cpu().contiguous())
        file.write(data)  # type: ignore[attr-defined]
        return zlib.crc32(data)

    def _look(self) -> tuple[int, int, int]:
        """Return values that change with the contents: size and times of the file that is open."""
        state = os.fstat(self._fd)
        if state.st_size < self.size:
            raise ValueError(f"{self.path} has {state.st_size} bytes and had {self.size}: it was cut under the cache")
        return state.st_size, state.st_mtime_ns, state.st_ctime_ns

    def read(self, e: int, into: Mapping[str, Tensor]) -> None:
        """Read one expert's part of some tensors into contiguous tensors on the CPU.

        Raises:
            ValueError: the file was cut or changed.
        """
        parts = {name: _bytes_of(row) for name, row in into.items()}
        done = {
            name: os.preadv(self._fd, [data], self._begin[name] + e * len(data)) if len(data) else 0
            for name, data in parts.items()
        }
        # The state after the reads: a change meanwhile shows in it.
        state = self._look()
        with self._lock:
            if state != self._state:
                self._verified.clear()
                self._state = state
            new = [name for name in parts if (name, e) not in self._verified]
        for name in new:
            if done[name] != len(parts[name]) or zlib.crc32(parts[name]) != self._checksums[name][e]:
                raise ValueError(
                    f"{self.path} was changed under the cache: expert {e} of {name} is not what was written there"
                )
        if new:
            with self._lock:
                self._verified.update((name, e) for name in new)

    def check(self, names: list[str]) -> None:
        """Raise a ``ValueError`` if a tensor differs from the written one. An unchanged file is not read."""
        if self._look() != self._written:
            for name in names:
                row = torch.empty_like(self.tensors[name][0])
                for e in range(len(self.tensors[name])):
                    self.read(e, {name: row})


class FileStore:
    """The part of an ``ExpertFile`` that is one module's.

    Args:
        file: the file.
        prefix: prefix of the names of the module's tensors there.
        names: the names after it.
    """

    def __init__(self, file: ExpertFile, prefix: str, names: list[str]) -> None:
        self.file, self.prefix = file, prefix
        self.tensors = {name: file.tensors[prefix + name] for name in names}

    def load(self, e: int, into: Mapping[str, Tensor]) -> None:
        read = {
            name: row if row.is_cpu else torch.empty_like(row, device="cpu", pin_memory=row.is_cuda)
            for name, row in into.items()
        }
        self.file.read(e, {self.prefix + name: row for name, row in read.items()})
        for name, row in into.items():
            if not row.is_cpu:
                row.copy_(read[name])

    def check(self) -> None:
        self.file.check([self.prefix + name for name in self.tensors])


def _bytes_of(t: Tensor) -> memoryview:
    """Return the memory of a contiguous tensor on the CPU."""
    return memoryview((ctypes.c_char * t.nbytes).from_address(t.data_ptr())).cast("B")
