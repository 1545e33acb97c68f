"""Checkpoints whose largest tensors lie in shards, one file a process: a folder in place of a file.

``NAME.ckpt/checkpoint.pt`` holds everything but the sharded tensors, and names the folder beside it that holds those
in the format of ``torch.distributed.checkpoint``. It is replaced last and in one move, so that a kill or a full disk
leaves the old checkpoint. Neither part is read by a pickle that could run code.
"""

from __future__ import annotations

import dataclasses
import pickle
import shutil
import uuid
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorProperties, TensorStorageMetadata

from apps.base.files import replacing
from apps.train.checkpoint_paths import SHARDED_PART, is_sharded

WEIGHT, STATE = "weight/", "state/"
"""Prefixes of the tensors' names: entries of the state dict, and the state of the optimizer that steps them."""

_REST, _KEY = SHARDED_PART, "sharded"
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


def write(path: Path, checkpoint: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
    """Write a checkpoint; every process of the default group takes part.

    Args:
        path: the folder.
        checkpoint: what rank 0 has to say; the other ranks' is not written.
        tensors: ``ShardedTensor`` of each rank, or tensors that one rank alone has, by name.

    Raises:
        OSError: it cannot be written; the earlier checkpoint is intact.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    name = [f"shards-{checkpoint.get('global_step', 0)}-{uuid.uuid4().hex[:8]}"]
    dist.broadcast_object_list(name)
    folder = path / name[0]
    try:
        if rank == 0 and path.is_file():
            path.unlink()  # of a run on one process
        with _quiet():
            dcp.save(dict(tensors), storage_writer=dcp.FileSystemWriter(folder))
        if rank == 0:
            with replacing(path / _REST, "wb") as file:
                torch.save({**checkpoint, _KEY: {"folder": name[0], "world_size": world}}, file)
            for old in path.glob("shards-*"):
                if old.name != name[0]:
                    shutil.rmtree(old, ignore_errors=True)
    except (OSError, RuntimeError, dcp.api.CheckpointException) as error:
        if rank == 0:
            shutil.rmtree(folder, ignore_errors=True)
        kept = "; the earlier one is intact" if is_sharded(path) else ""
        raise OSError(f"cannot write the checkpoint {path}: {_reason(error)}{kept}") from error


def read(path: Path | str, device: str = "cpu") -> dict[str, Any]:
    """The checkpoint as one process has it: the sharded weights put together in its ``state_dict``.

    Args:
        path: the folder.
        device: "meta" gives the sharded weights' shapes alone.

    Raises:
        ValueError: it is damaged, or of another program.
    """
    path = Path(path)
    checkpoint = read_rest(path)
    with _readable(path):
        saved = _Reader(path / checkpoint[_KEY]["folder"]).tensors()
        found = {k: v for k, v in saved.items() if k.startswith(WEIGHT)}
        tensors = {k: torch.empty(v.size, dtype=v.properties.dtype, device=device) for k, v in found.items()}
        if device != "meta":
            load(path, checkpoint, tensors)
    checkpoint["state_dict"] |= {k.removeprefix(WEIGHT): v for k, v in tensors.items()}
    return checkpoint


def read_rest(path: Path) -> dict[str, Any]:
    """The checkpoint but for the sharded tensors.

    Raises:
        ValueError: it is damaged, or of another program.
    """
    with _readable(path):
        checkpoint = torch.load(path / _REST, map_location="cpu", weights_only=True)
        if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint or _KEY not in checkpoint:
            raise ValueError("it has no state_dict")
        folder = str(checkpoint[_KEY]["folder"])
        if not folder.startswith("shards-") or Path(folder).name != folder:
            raise ValueError(f"its shards are not beside it: {folder}")
    return checkpoint


def remove(path: Path) -> None:
    """Delete a checkpoint, a folder or a file."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def load(path: Path, checkpoint: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
    """Copy saved tensors into ``tensors``: any part of them, however they were sharded. No process waits for another.

    Args:
        path: the folder.
        checkpoint: of ``read_rest``.
        tensors: ``ShardedTensor`` or tensors, by name.

    Raises:
        ValueError: one is missing there or of another size; damaged files.
    """
    folder = path / checkpoint[_KEY]["folder"]
    with _readable(path):
        sizes = {k: tuple(v.size) for k, v in _Reader(folder).tensors().items()}
    world = checkpoint[_KEY]["world_size"]
    with _quiet():
        wrong = [(name, tuple(t.size())) for name, t in tensors.items() if sizes.get(name) != tuple(t.size())]
    for name, here in wrong[:1]:
        raise ValueError(
            f"{path}, written by {world} processes, does not fit this run's shards: {name} is "
            f"{sizes.get(name, 'missing')} there and {here} here"
        )
    with _readable(path), _quiet():
        dcp.load(dict(tensors), storage_reader=_Reader(folder), no_dist=True)


class _Reader(dcp.FileSystemReader):
    """Reads the table of contents by an unpickler that knows its few classes and no other."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with open(Path(self.path) / ".metadata", "rb") as file:
            metadata = _Unpickler(file).load()
        if not isinstance(metadata, Metadata):
            raise ValueError("no table of contents")
        for where in (metadata.storage_data or {}).values():
            if Path(where.relative_path).name != where.relative_path:  # shards lie beside the table
                raise ValueError(f"a shard outside the folder: {where.relative_path}")
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata

    def tensors(self) -> dict[str, TensorStorageMetadata]:
        """The sizes and types of what is saved, by name."""
        found = self.read_metadata().state_dict_metadata
        return {k: v for k, v in found.items() if isinstance(v, TensorStorageMetadata)}


class _Unpickler(pickle._Unpickler):  # type: ignore[name-defined, misc]
    """Makes objects of the classes in ``_SAFE``, and changes nothing that it has not made itself.

    A pickle may set attributes on what it has named: here on new dataclasses alone, and their own fields alone. (The
    unpickler in C has no place to say so.)
    """

    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)  # type: ignore[attr-defined]

    def find_class(self, module: str, name: str) -> Any:
        if name not in _SAFE.get(module, ()):
            raise pickle.UnpicklingError(f"{module}.{name} has no place in a checkpoint")
        return super().find_class(module, name)

    def load_build(self) -> None:
        state, made = self.stack[-1], self.stack[-2]  # type: ignore[attr-defined]
        if not isinstance(made, TensorProperties):  # which reads its state, a tuple, by itself
            if isinstance(made, type) or not dataclasses.is_dataclass(made) or not isinstance(state, dict):
                raise pickle.UnpicklingError(f"it sets attributes of {made!r}")
            if foreign := state.keys() - {field.name for field in dataclasses.fields(made)}:
                raise pickle.UnpicklingError(f"{type(made).__name__} has no {min(foreign)}")
        super().load_build()  # type: ignore[misc]

    dispatch[pickle.BUILD[0]] = load_build


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Any failure inside as one line."""
    try:
        yield
    except PermissionError:
        raise
    except (Exception, dcp.api.CheckpointException) as error:  # the latter is no Exception
        raise ValueError(f"{path} is not a readable checkpoint: damaged, cut short, or of another program") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the notes that ranks hold different tables, as they are meant to, and of deprecations inside torch."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _reason(error: BaseException) -> str:
    inner: BaseException = error
    if isinstance(error, dcp.api.CheckpointException):
        inner = next(iter(error.failures.values()))[0]
    return getattr(inner, "strerror", None) or " ".join(str(inner).split())[:200]
