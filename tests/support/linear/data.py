"""scikit-learn's digits in memory: three of five images to train on, one for validation, one for the test."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from sklearn.datasets import load_digits
from torch import Tensor

from apps.data.suite_data import SuiteData
from apps.vision.encoding import ImageEncoding, normalize

ENCODING = ImageEncoding(class_names=tuple("0123456789"), image_size=8, in_chans=1, mean=(0.3,), std=(0.4,))


class Batch(NamedTuple):
    image: Tensor
    label: Tensor


class Images:
    def __init__(self, image: Tensor, label: Tensor) -> None:
        self.image, self.label = image, label

    def __len__(self) -> int:
        return len(self.label)

    def __getitems__(self, index: list[int]) -> Batch:
        return Batch(self.image[index], self.label[index])


class LinearData(SuiteData):
    unit = "images"

    def __init__(self, batch_size: int = 64, **kwargs: Any) -> None:
        super().__init__("digits", None, None, batch_size=batch_size, eval_batch_size=256, **kwargs)

    def read(self) -> dict[str, Images]:
        digits = load_digits()
        pixels = torch.from_numpy(digits.images * 15).byte().unsqueeze(1)
        image, label = normalize(pixels, ENCODING.mean, ENCODING.std), torch.from_numpy(digits.target)
        part = torch.tensor([0, 0, 0, 1, 2]).repeat(len(image))[: len(image)]
        return {split: Images(image[part == i], label[part == i]) for i, split in enumerate(("train", "val", "test"))}

    def examples(self, split: str) -> Images:
        return self.opened[split]
