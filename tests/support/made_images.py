"""Datasets of a few images, made on the spot."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from apps.vision.batch import ImageBatch
from apps.vision.data import VisionData

EVERY_TRANSFORM = {
    "crop_padding": 2,
    "horizontal_flip": True,
    "random_resized_crop": 0.5,
    "randaugment_ops": 2,
    "random_erasing": 0.5,
    "mixup_alpha": 0.8,
    "cutmix_alpha": 1.0,
}


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.astype(np.uint8).tobytes()


def write_mnist(folder: Path, train: int = 40, test: int = 20, zipped: bool = True) -> Path:
    """Write the four files of MNIST, in which image n is n everywhere and its label is n % 10."""
    folder.mkdir(parents=True, exist_ok=True)
    for prefix, count in (("train", train), ("t10k", test)):
        n = np.arange(count)
        for kind, array in (("images-idx3", np.tile(n[:, None, None], (1, 28, 28))), ("labels-idx1", n % 10)):
            name, content = f"{prefix}-{kind}-ubyte", idx(array)
            (folder / (name + ".gz" * zipped)).write_bytes(gzip.compress(content) if zipped else content)
    return folder


def write_images(
    folder: Path, split: str, per_class: int, side: int = 8, classes: tuple[str, ...] = ("a", "b")
) -> None:
    for label, name in enumerate(classes):
        (folder / split / name).mkdir(parents=True)
        for i in range(per_class):
            pixels = np.full((side, side, 3), 10 * i + label, np.uint8)
            Image.fromarray(pixels).save(folder / split / name / f"{i}.png")


def ready(dataset: str, root: Path | None = None, **options: Any) -> VisionData:
    data = VisionData(dataset, root=None if root is None else str(root), **{"seed": 0, **options})
    data.prepare_data()
    data.setup("fit")
    return data


def pixels(batch: ImageBatch, data: VisionData) -> Tensor:
    """Return the images before they were normalized, 0 to 255."""
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (data.encoding.mean, data.encoding.std))
    return ((batch.image * std + mean) * 255).round()


def indices(loader: Any) -> list[int]:
    return [i for batch in loader for i in batch.index.tolist()]
