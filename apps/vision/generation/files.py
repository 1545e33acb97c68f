"""Drawn images as files: a folder a class, and a grid of all classes."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from PIL import Image
from torch import Tensor
from torchvision.utils import make_grid

from apps.base.files import folder_beside, put_folder, read_json, write_json
from apps.vision.image_files import to_array

GRID, MARK = "grid.png", "images.json"
_MOST_IN_GRID = 10
_SIDE = 64
"""Least height of an image in a grid, in pixels."""


def to_image(pixels: Tensor) -> Image.Image:
    """Return uint8 (C, H, W) as an image."""
    return Image.fromarray(to_array(pixels))


def grid_of(rows: Sequence[Tensor]) -> Image.Image:
    """Return rows of images, uint8 (N, C, H, W) each, as one image."""
    width = max(map(len, rows))
    rows = [torch.cat((row, row.new_full((width - len(row), *row.shape[1:]), 255))) for row in rows]
    images = torch.cat(rows)
    times = max(1, _SIDE // images.shape[-1])
    images = images.repeat_interleave(times, -1).repeat_interleave(times, -2)
    return to_image(make_grid(images, nrow=width, padding=2, pad_value=255))


def folder_names(names: Sequence[str]) -> list[str]:
    """Return a folder's name for each class: its own where files may be called so and no other class is."""
    plain = [re.sub(r"[^\w.-]+", "_", name).strip("._") or "class" for name in names]
    return [name if plain.count(name) == 1 else f"{name}_{label}" for label, name in enumerate(plain)]


class ImageFolder(Callback):
    """A callback that writes drawn images into a folder, which is there once all of them are.

    It has ``CLASS/0000.png``, ..., ``grid.png`` with the first images of each class in a row, and ``images.json``, by
    which a later run knows that it may replace the folder.

    Args:
        folder: the folder.
        overwrite: replace an earlier folder of drawn images.

    Raises:
        ValueError: the folder holds something, which is to stay.
    """

    def __init__(self, folder: Path, overwrite: bool) -> None:
        self.folder, self.overwrite = folder, overwrite
        self.counts: dict[str, int] = {}
        self._rows: dict[str, list[Tensor]] = {}
        self._check()

    def _check(self) -> None:
        if not self.folder.exists() or (self.folder.is_dir() and not any(self.folder.iterdir())):
            return
        if not self.folder.is_dir() or read_json(self.folder / MARK) is None:
            raise ValueError(f"{self.folder} holds other files than drawn images: give a new folder by --output DIR")
        if not self.overwrite:
            raise ValueError(f"{self.folder} exists: --overwrite replaces it, --output DIR writes another")

    @contextlib.contextmanager
    def open(self) -> Iterator[ImageFolder]:
        """Take images inside; the folder is there once the block has ended without an error."""
        with folder_beside(self.folder) as self._new:
            yield self
            (grid_of([torch.stack(row) for row in self._rows.values()])).save(self._new / GRID)
            write_json(self._new / MARK, {"images": self.counts})
            self._check()
            put_folder(self._new, self.folder)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        encoding: Any = pl_module.encoding
        self.names = folder_names(encoding.class_names)

    def on_predict_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        for label, number, pixels in zip(outputs.label.tolist(), outputs.index.tolist(), outputs.pixels, strict=True):
            name = self.names[label]
            path = self._new / name / f"{number:04}.png"
            path.parent.mkdir(exist_ok=True)
            pixels = pixels.cpu()
            to_image(pixels).save(path)
            self.counts[name] = self.counts.get(name, 0) + 1
            row = self._rows.setdefault(name, [])
            if len(row) < _MOST_IN_GRID:
                row.append(pixels)

    def __str__(self) -> str:
        images = f"{sum(self.counts.values()):,} images of {', '.join(self.counts)}"
        return f"{images} in {self.folder}, the first of each in {self.folder / GRID}"
