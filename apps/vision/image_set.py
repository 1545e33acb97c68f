"""Sets of images that are read by whole batches, and how they are split."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor


class ImageSet(torch.utils.data.Dataset[Any]):
    """Images that are read by whole batches: ``set.__getitems__(positions)`` is (uint8 (B, C, H, W), label, index).

    Args:
        read: a function from indices (B,) to their images.
        labels: int64 (N,).
        index: the indices that the set holds, in its order; None: all.
    """

    def __init__(self, read: Callable[[Tensor], Tensor], labels: Tensor, index: Tensor | None = None) -> None:
        self.read = read
        self.labels = labels
        self.index = torch.arange(len(labels)) if index is None else index

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, position: int) -> tuple[Tensor, Tensor, Tensor]:
        image, label, index = self.__getitems__([position])
        return image[0], label[0], index[0]

    def __getitems__(self, positions: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        index = self.index[torch.as_tensor(positions)]
        return self.read(index), self.labels[index], index

    def subset(self, positions: Tensor) -> ImageSet:
        """Return the images at ``positions``, in their order."""
        return ImageSet(self.read, self.labels, self.index[positions])

    def mixed(self) -> ImageSet:
        """Return all images in an order that is random but always the same one."""
        return self.subset(torch.randperm(len(self), generator=torch.Generator().manual_seed(0)))


class Splits(NamedTuple):
    """The images of a dataset. ``val`` is None without a validation split, ``train`` if there is only a test."""

    train: ImageSet | None
    test: ImageSet
    val: ImageSet | None = None


def in_memory(images: np.ndarray, labels: np.ndarray, path: Path, num_classes: int) -> ImageSet:
    """Return uint8 (N, C, H, W) with labels in ``range(num_classes)``, which came from ``path``, as a set."""
    if len(labels) and not 0 <= labels.min() <= labels.max() < num_classes:
        span = f"{labels.min()} to {labels.max()}"
        raise ValueError(f"{path} is corrupt: labels go from 0 to {num_classes - 1}, not {span}")
    # arrays made of file bytes are read-only: torch would warn
    pixels = torch.from_numpy(np.require(images, requirements=["C", "W"]))
    return ImageSet(pixels.__getitem__, torch.from_numpy(labels.astype(np.int64)))


def stratified_split(labels: Tensor, num: int, seed: int) -> tuple[Tensor, Tensor]:
    """Choose ``num`` positions at random with the classes in their shares, and the rest; both sorted.

    The images of a class are shuffled and put at even distances on [0, 1]; the first ``num`` on that line are chosen.

    Args:
        labels: int64 (N,).
        num: number of positions to choose, 0 to N.
        seed: the only source of randomness.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    place = torch.empty(len(labels), dtype=torch.float64)
    for label in labels.unique():
        of_class = order[labels[order] == label]
        place[of_class] = (torch.arange(len(of_class), dtype=torch.float64) + 0.5) / len(of_class)
    ranked = order[place[order].argsort(stable=True)]  # ties between classes fall as they were shuffled
    return ranked[:num].sort().values, ranked[num:].sort().values
