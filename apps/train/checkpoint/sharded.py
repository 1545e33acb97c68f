"""A sharded checkpoint is a folder with the parts of its largest tensors, one file a process.

Sharded tensors are TorchRec's tables, by the names of parameters, and every ``DTensor`` in the contents, by its place
there.

``NAME.ckpt/checkpoint.pt`` holds everything but the sharded tensors, and names the folder next to it that holds the
sharded tensors in the format of ``torch.distributed.checkpoint``. It is replaced last and in one move, so that a kill
or a full disk leaves the old checkpoint. No part is read by a pickle that could run code.
"""

from __future__ import annotations

import functools
import json
import shutil
import uuid
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.tensor import DTensor

from apps.base.files import replacing, temporary_path
from apps.base.messages import EveryProcessError
from apps.train.checkpoint.paths import SHARDED_PART, is_sharded
from apps.train.checkpoint.readable import SafeReader, readable, reason_of

WEIGHT, STATE, PLACE = "weight/", "state/", "place/"
"""Prefixes of the tensors' names: entries of the state dict, the state of the optimizer that steps them, and places in
the contents, which are the keys from the outermost one on, as JSON."""

_REST, _KEY = SHARDED_PART, "sharded"


# torch warns that ranks hold different tables, which is meant, and of its own deprecations.
_quiet = functools.partial(warnings.catch_warnings, action="ignore")


def write(path: Path, checkpoint: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
    """Write a checkpoint; every process of the default group takes part.

    Args:
        path: the folder.
        checkpoint: contents without the sharded tensors; rank 0's are written.
        tensors: ``ShardedTensor`` of each rank, or tensors that only one rank has, by name.

    Raises:
        OSError: the checkpoint cannot be written; the earlier one is intact.
    """
    with _quiet():
        Writing(path, checkpoint, tensors).run()


class Writing:
    """One writing of a checkpoint: making it settles the contents, and ``run`` writes it, in any thread.

    Every process makes it, and runs it.

    Args:
        path, checkpoint, tensors: as in ``write``.
        group: processes of ``run``; None: the default group.
        copied: whether the contents are copied to the memory of the host, so that training may continue meanwhile.
    """

    def __init__(
        self,
        path: Path,
        checkpoint: Mapping[str, Any],
        tensors: Mapping[str, Any],
        group: dist.ProcessGroup | None = None,
        copied: bool = False,
    ) -> None:
        # A run on one process may have left a file, which stays until the folder is whole.
        names = [
            f"shards-{checkpoint.get('global_step', 0)}-{uuid.uuid4().hex[:8]}",
            str(temporary_path(path) if path.is_file() else path),
        ]
        dist.broadcast_object_list(names, group=group)
        self.path, self.name, self.folder, self.group = path, names[0], Path(names[1]), group
        self.rest, placed = taken_out(checkpoint)
        self.tensors = {**tensors, **placed}
        if copied:
            self.tensors = _on_host(self.tensors)
            self.rest = _on_host(self.rest) if dist.get_rank() == 0 else {}

    def run(self) -> None:
        """Write the checkpoint.

        Raises:
            EveryProcessError: it cannot be written; the earlier one is intact.
        """
        shards = self.folder / self.name
        try:
            dcp.save(self.tensors, storage_writer=dcp.FileSystemWriter(shards), process_group=self.group)
            failures = [self._finish() if dist.get_rank() == 0 else None]
            dist.broadcast_object_list(failures, group=self.group)
            if failures[0] is not None:
                raise OSError(failures[0])
        except (OSError, RuntimeError, dcp.api.CheckpointException) as error:
            if dist.get_rank() == 0:
                shutil.rmtree(shards if self.folder == self.path else self.folder, ignore_errors=True)
            kept = "; the earlier one is intact" if self.path.is_file() or is_sharded(self.path) else ""
            raise EveryProcessError(f"cannot write the checkpoint {self.path}: {reason_of(error)}{kept}") from error

    def _finish(self) -> str | None:
        """Make the folder the checkpoint, and return why that failed, or None."""
        try:
            with replacing(self.folder / _REST, "wb") as file:
                tables = any(name.startswith(WEIGHT) for name in self.tensors)
                about = {"folder": self.name, "world_size": dist.get_world_size(), "tables": tables}
                torch.save({**self.rest, _KEY: about}, file)
            if self.folder != self.path:
                self.path.unlink()
                self.folder.rename(self.path)
        except Exception as error:
            return reason_of(error)
        for old in self.path.glob("shards-*"):
            if old.name != self.name:
                shutil.rmtree(old, ignore_errors=True)
        return None


class BackgroundWriter:
    """Writes checkpoints in a thread, one after another, while the training continues.

    Args:
        timeout: longest time of a collective of the thread; None: torch's default.
    """

    def __init__(self, timeout: timedelta | None = None) -> None:
        self.timeout = timeout
        self._pending: Future[None] | None = None
        self._group: dist.ProcessGroup | None = None

    def write(self, path: Path, checkpoint: Mapping[str, Any]) -> None:
        """Wait for the checkpoint before, copy the contents to the memory of the host, and start to write them.

        Every process calls it.

        Args:
            path: the folder.
            checkpoint: contents; rank 0's are written, but for every ``DTensor``, which is written whole.

        Raises:
            OSError: the checkpoint before could not be written.
        """
        self.wait()
        if self._group is None:  # the training uses the default group meanwhile, and GPUs have none for the host
            self._group = dist.new_group(backend="gloo", timeout=self.timeout)
        writing = Writing(path, checkpoint, {}, self._group, copied=True)
        thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending = thread.submit(writing.run)
        thread.shutdown(wait=False)

    def wait(self) -> None:
        """Wait until the last checkpoint is written.

        Raises:
            OSError: it could not be written; the next call raises nothing.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()


def read(path: Path | str, device: str = "cpu") -> dict[str, Any]:
    """Return the checkpoint as one process has it, with the sharded weights put together in its ``state_dict``.

    On the device "meta" the sharded weights have only shapes.

    Raises:
        ValueError: the checkpoint is damaged, or another program's.
    """
    path = Path(path)
    checkpoint = read_rest(path)
    with readable(path):
        saved = SafeReader(path / checkpoint[_KEY]["folder"]).tensors()
        wanted = {k: v for k, v in saved.items() if k.startswith((WEIGHT, PLACE))}
        tensors = {k: torch.empty(v.size, dtype=v.properties.dtype, device=device) for k, v in wanted.items()}
    if device != "meta":
        load(path, checkpoint, tensors)
    checkpoint["state_dict"] |= {k.removeprefix(WEIGHT): v for k, v in tensors.items() if k.startswith(WEIGHT)}
    put_back(checkpoint, tensors)
    return checkpoint


def fill(path: Path, checkpoint: Mapping[str, Any], places: Mapping[str, Any], names: Iterable[str]) -> None:
    """Copy saved tensors to their places in contents of the form that ``read`` returns, one part at a time.

    Args:
        path: the folder.
        checkpoint: contents from ``read_rest``.
        places: contents with tensors of the right sizes.
        names: the tensors, as they are called in the folder; see ``WEIGHT`` and ``PLACE``.

    Raises:
        ValueError: as ``load``.
    """
    tensors = {}
    for name in names:
        place: Any = places
        for key in place_of(name):
            place = place[key]
        tensors[name] = place
    load(path, checkpoint, tensors)


def has_tables(checkpoint: Mapping[str, Any]) -> bool:
    """Return whether contents come from a folder with TorchRec's tables, which have an optimizer of their own."""
    return _KEY in checkpoint and bool(checkpoint[_KEY].get("tables", True))


def saved_tensors(path: Path, checkpoint: Mapping[str, Any]) -> dict[str, TensorStorageMetadata]:
    """Return the sizes and types of the tensors in the folder of the shards, by name.

    Raises:
        ValueError: the checkpoint is damaged, or another program's.
    """
    with readable(path):
        return SafeReader(path / checkpoint[_KEY]["folder"]).tensors()


def place_of(name: str) -> list[Any]:
    """Return the keys, from the outermost one on, of a tensor's place in the contents that ``read`` returns."""
    if name.startswith(WEIGHT):
        return ["state_dict", name.removeprefix(WEIGHT)]
    return list(json.loads(name.removeprefix(PLACE)))


def read_placed(path: Path, target: Callable[[list[Any], tuple[int, ...]], Tensor | None]) -> dict[str, Any]:
    """Return the checkpoint with every tensor that was a ``DTensor`` read into one of this run, however it is sharded.

    Args:
        path: the folder.
        target: function that returns the tensor to read into, given the keys of its place and its shape; None: a plain
            one, of the whole.

    Raises:
        ValueError: the checkpoint is damaged or another program's, or a tensor has another size than its target.
    """
    checkpoint = read_rest(path)
    saved = saved_tensors(path, checkpoint)
    tensors = {}
    for key, kind in saved.items():
        if key.startswith(PLACE):
            own = target(json.loads(key.removeprefix(PLACE)), tuple(kind.size))
            tensors[key] = torch.empty(kind.size, dtype=kind.properties.dtype) if own is None else own
    load(path, checkpoint, tensors)
    put_back(checkpoint, tensors)
    return checkpoint


def plain(contents: Mapping[str, Any]) -> dict[str, Any]:
    """Return contents from ``read_rest`` without the entries that mark a folder: containers are copied."""
    return {key: value for key, value in taken_out(contents)[0].items() if key != _KEY}


def taken_out(contents: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the contents with None for every ``DTensor``, and these by their names in a sharded checkpoint."""
    tensors: dict[str, Tensor] = {}

    def walk(value: Any, keys: list[Any]) -> Any:
        if isinstance(value, DTensor):
            tensors[PLACE + json.dumps(keys)] = value.detach()
            return None
        if isinstance(value, Mapping):
            kept = {key: walk(item, [*keys, key]) for key, item in value.items()}
            return OrderedDict(kept) if isinstance(value, OrderedDict) else kept
        if isinstance(value, list | tuple):
            return type(value)([walk(item, [*keys, i]) for i, item in enumerate(value)])
        return value

    return walk(contents, []), tensors


def _on_host(value: Any) -> Any:
    """Return a copy of nested contents with every tensor on the host; tensors of one memory stay tied."""
    copies: dict[Any, Tensor] = {}

    def walk(value: Any) -> Any:
        if isinstance(value, DTensor):
            return value.to("cpu", copy=True)
        if isinstance(value, Tensor):
            key = (value.untyped_storage().data_ptr(), value.storage_offset(), value.shape, value.stride(), value.dtype)
            if key not in copies:
                copies[key] = value.detach().to("cpu", copy=True)
            return copies[key]
        if isinstance(value, Mapping):
            copy = {key: walk(item) for key, item in value.items()}
            return OrderedDict(copy) if isinstance(value, OrderedDict) else copy
        return type(value)(walk(item) for item in value) if isinstance(value, list | tuple) else value

    return walk(value)


def put_back(contents: dict[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Put tensors at their places in what ``taken_out`` has left.

    Raises:
        ValueError: the contents have no such place.
    """
    for name, tensor in tensors.items():
        if name.startswith(PLACE):
            *keys, last = json.loads(name.removeprefix(PLACE))
            parent: Any = contents
            try:
                for key in keys:
                    parent = parent[key]
                parent[last] = tensor
            except (KeyError, IndexError, TypeError) as error:
                raise ValueError(
                    f"the sharded tensor {name.removeprefix(PLACE)} has no place in the contents"
                ) from error


def read_rest(path: Path) -> dict[str, Any]:
    """Return the checkpoint without the sharded tensors.

    Raises:
        ValueError: the checkpoint is damaged, or another program's.
    """
    with readable(path, _REST):
        checkpoint = torch.load(path / _REST, map_location="cpu", weights_only=True)
        if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint or _KEY not in checkpoint:
            raise ValueError("it has no state_dict")
        folder = str(checkpoint[_KEY]["folder"])
        if not folder.startswith("shards-") or Path(folder).name != folder:
            raise ValueError(f"its shards are not beside it: {folder}")
    return checkpoint


def load(path: Path, checkpoint: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
    """Copy saved tensors into ``tensors``, however either are sharded. No process waits for another.

    Args:
        path: the folder.
        checkpoint: contents from ``read_rest``.
        tensors: ``ShardedTensor`` or tensors, by name.

    Raises:
        ValueError: a tensor is missing or has another size, or a file is damaged.
    """
    folder = path / checkpoint[_KEY]["folder"]
    with readable(path):
        reader = SafeReader(folder)
        reader.check_parts()
        sizes = {k: tuple(v.size) for k, v in reader.tensors().items()}
    world = checkpoint[_KEY]["world_size"]
    with _quiet():
        wrong = [(name, tuple(t.size())) for name, t in tensors.items() if sizes.get(name) != tuple(t.size())]
    for name, here in wrong[:1]:
        raise ValueError(
            f"{path}, written by {world} processes, does not fit this run's shards: {name} is "
            f"{sizes.get(name, 'missing')} there and {here} here"
        )
    with readable(path), _quiet():
        dcp.load(dict(tensors), storage_reader=SafeReader(folder), no_dist=True)
