"""Readers of sharded checkpoints that run no code of the file."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorProperties, TensorStorageMetadata

from apps.base.files import os_error
from apps.base.messages import one_line

_SAFE = {
    "torch": {
        "Size", "device", "float32", "float16", "bfloat16", "float64", "int64", "int32", "uint8", "int8", "bool",
        "strided",
    },
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.metadata": {
        "Metadata", "MetadataIndex", "TensorStorageMetadata", "ChunkStorageMetadata", "BytesStorageMetadata",
        "TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath", "Path", "PurePosixPath"},
}  # fmt: skip


class SafeReader(dcp.FileSystemReader):
    """Reads the table of contents by an unpickler that knows its few classes and no other."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with open(Path(self.path) / ".metadata", "rb") as file:
            metadata = _Unpickler(file).load()
        if not isinstance(metadata, Metadata):
            raise ValueError("no table of contents")
        for where in (metadata.storage_data or {}).values():
            if Path(where.relative_path).name != where.relative_path:  # shards lie next to the table
                raise ValueError(f"a shard outside the folder: {where.relative_path}")
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata

    def read_data(self, plan: dcp.LoadPlan, planner: dcp.LoadPlanner) -> torch.futures.Future[None]:
        for item in plan.items:  # one by one: torch's reader holds a part while it reads the next one
            super().read_data(dataclasses.replace(plan, items=[item]), planner)
        return super().read_data(dataclasses.replace(plan, items=[]), planner)

    def check_parts(self) -> None:
        """Raise a ``DamagedError`` if a file of shards is missing or cut short, before anything is read."""
        ends: dict[str, int] = {}
        for where in self.read_metadata().storage_data.values():
            ends[where.relative_path] = max(ends.get(where.relative_path, 0), where.offset + where.length)
        for name, end in ends.items():
            file = Path(self.path) / name
            if not file.is_file():
                raise DamagedError(f"{file.parent.name}/{name} is missing")
            if file.stat().st_size < end:
                raise DamagedError(f"{file.parent.name}/{name} has {file.stat().st_size:,} of {end:,} bytes")

    def tensors(self) -> dict[str, TensorStorageMetadata]:
        """Return the sizes and types of the saved tensors, by name."""
        saved = self.read_metadata().state_dict_metadata
        return {k: v for k, v in saved.items() if isinstance(v, TensorStorageMetadata)}


class _Unpickler(pickle._Unpickler):  # type: ignore[name-defined, misc]
    """Makes objects of the classes in ``_SAFE``, and changes nothing that it has not made itself.

    A pickle may set attributes on anything that it names; here it sets only the fields of new dataclasses. (The
    unpickler in C has no hook for that.)
    """

    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)  # type: ignore[attr-defined]

    def find_class(self, module: str, name: str) -> Any:
        module = "pathlib" if module == "pathlib._local" else module  # where Python 3.13 keeps them
        if name not in _SAFE.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint")
        return super().find_class(module, name)

    def load_build(self) -> None:
        state, made = self.stack[-1], self.stack[-2]  # type: ignore[attr-defined]
        if not isinstance(made, TensorProperties):  # its state is a tuple, which it reads itself
            if isinstance(made, type) or not dataclasses.is_dataclass(made) or not isinstance(state, dict):
                raise pickle.UnpicklingError(f"it sets attributes of {made!r}")
            if foreign := state.keys() - {field.name for field in dataclasses.fields(made)}:
                raise pickle.UnpicklingError(f"{type(made).__name__} has no {min(foreign)}")
        super().load_build()  # type: ignore[misc]

    dispatch[pickle.BUILD[0]] = load_build


class DamagedError(ValueError):
    """A part of a checkpoint is missing or cut short; the message names it."""


@contextmanager
def readable(path: Path | str, part: str = "") -> Iterator[None]:
    """Turn any failure inside into a ValueError of one line.

    Args:
        path: the checkpoint.
        part: the file in it that is read; "": the error names one, or there is none.
    """
    try:
        yield
    except PermissionError:
        raise
    except (Exception, dcp.api.CheckpointException) as error:  # the latter is not an Exception
        if isinstance(error, DamagedError):
            part = str(error)
        elif isinstance(error, FileNotFoundError) and error.filename is not None:
            part = f"{Path(error.filename).parent.name}/{Path(error.filename).name} is missing"
        asked, where = _code_in(path), f" ({part})" if part else ""
        why = f"it asks for {asked}, which no checkpoint may" if asked else "damaged, cut short, or of another program"
        raise ValueError(f"{path} is not a readable checkpoint: {why}{where}") from error


def _code_in(path: Path | str) -> str:
    """Return the name of a function or class that a file's pickle wants to call, which torch reads without calling it;
    "": there is none that a checkpoint may not have, or the file is not torch's."""
    with suppress(Exception):
        return ", ".join(sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))[:1])
    return ""


def reason_of(error: BaseException) -> str:
    inner: BaseException = error
    if isinstance(error, dcp.api.CheckpointException):
        inner = next(iter(error.failures.values()))[0]
    cause = os_error(inner)
    if cause is None and "inline_container" in str(inner):  # torch names its zip file, and no reason
        return "the disk may be full"
    return (cause and cause.strerror) or one_line(str(inner))[:200]
