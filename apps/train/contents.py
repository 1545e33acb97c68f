"""The contents of a checkpoint are tensors and plain values, read without a pickle that could run code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from apps.train import sharded


def read_checkpoint(path: Path | str, shapes_only: bool = False) -> dict[str, Any]:
    """Return a checkpoint's contents on the CPU. Tensors of a file are mapped, and read where they are used.

    Args:
        path: a file, or the folder of a sharded checkpoint.
        shapes_only: of sharded tensors give the shapes alone, on the meta device.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged, or is no checkpoint.
    """
    if sharded.is_sharded(path):
        return sharded.read(path, device="meta" if shapes_only else "cpu")
    if not Path(path).is_file():
        raise FileNotFoundError(f"no checkpoint {path}")
    with sharded.readable(path):
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise ValueError(f"{path} is not a checkpoint of a training run: it has no state_dict")
    return checkpoint
