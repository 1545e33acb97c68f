"""A checkpoint written tensor by tensor: its file is laid out first, and then filled through a memory map.

Beside the source, which is mapped too, one tensor or one converted layer is in memory at a time.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apps.base.files import naming
from apps.base.progress import bar


def write_checkpoint(
    path: Path, rest: Mapping[str, Any], layout: Mapping[str, Tensor], values: Iterable[tuple[str, Tensor]]
) -> None:
    """Write a checkpoint whose tensors are made one after another.

    Args:
        path: the file, in a folder that exists.
        rest: the contents beside ``state_dict``.
        layout: tensors of any contents for the ``state_dict``; names with one tensor share it in the file.
        values: the value of each name; all names occur.

    Raises:
        OSError: the file cannot be written, as on a full disk.
        ValueError: a value has another shape than the layout.
    """
    mapped = laid_out(path, {**rest, "state_dict": dict(layout)})
    fill({name: value for name, value in mapped.items() if name != "state_dict"}, rest)
    with bar("writing the new model", sum(map(_num_bytes, layout.values()))) as shown:
        for name, value in values:
            place = mapped["state_dict"][name]
            if place.shape != value.shape:
                raise ValueError(f"{name} has shape {tuple(value.shape)}, and its place {tuple(place.shape)}")
            place.copy_(value)
            del value  # before the next one is made
            shown.advance(_num_bytes(place))
    sync(path)


def _num_bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def laid_out(path: Path, contents: Mapping[str, Any]) -> Any:
    """Write a file of contents whose tensors have no values yet, and return it mapped: what is copied to a tensor is
    written.

    Args:
        path: the file, in a folder that exists.
        contents: plain values, and tensors of any contents on the CPU.

    Raises:
        OSError: the file cannot be written, as on a full disk.
    """
    with naming(path):
        try:
            with torch.serialization.skip_data():
                torch.save(dict(contents), path)
        except RuntimeError as error:  # torch does not say why its zip file cannot be written
            raise OSError(f"cannot write {path}: the disk may be full") from error
        if hasattr(os, "posix_fallocate"):
            with open(path, "r+b") as file:
                # The file has holes so far: a full disk has to show here, and not in a write through the map.
                os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
    with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def sync(path: Path) -> None:
    """Wait until a file is on the disk."""
    with open(path, "r+b") as file:
        os.fsync(file.fileno())


def fill(places: Any, values: Any) -> None:
    """Copy each tensor of nested values to its place in values of the same form, which may have further tensors."""
    if isinstance(values, Tensor):
        places.copy_(values)
    elif isinstance(values, Mapping):
        for name, value in values.items():
            fill(places[name], value)
    elif isinstance(values, (list, tuple)):
        for place, value in zip(places, values, strict=True):
            fill(place, value)
