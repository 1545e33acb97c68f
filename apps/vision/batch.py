"""The batch of an image classifier, and how it is made from raw images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor
from torchvision.transforms import v2

from apps.base.checks import check_at_least
from apps.vision.augment import (
    RANDAUGMENT_BINS,
    BatchRandAugment,
    crop_and_flip,
    mix,
    random_erase,
    random_resized_crop,
)
from apps.vision.encoding import normalize


class ImageBatch(NamedTuple):
    """The input and the labels of a vision model.

    Attributes:
        image: float32 (B, C, H, W), normalised to mean 0 and deviation 1 by the dataset's constants.
        label: int64 (B,), -1 where there is none; or float32 (B, num_classes) with rows that sum to 1 where images are
            mixed.
        index: int64 (B,), the position of each image in its file or folder listing.
    """

    image: Tensor
    label: Tensor
    index: Tensor  # type: ignore[assignment]  # a batch has no use for tuple.index


@dataclass(frozen=True)
class Augment:
    """The random transforms of a training batch; the defaults do nothing. The attributes are options of `VisionData`.

    Raises:
        ValueError: a value out of its range.
    """

    crop_padding: int = 0
    horizontal_flip: bool = False
    random_resized_crop: float | None = None
    randaugment_ops: int = 0
    randaugment_magnitude: int = 9
    random_erasing: float = 0.0
    mixup_alpha: float = 0.0
    cutmix_alpha: float = 0.0

    def __post_init__(self) -> None:
        for name in ("crop_padding", "randaugment_ops", "mixup_alpha", "cutmix_alpha"):
            check_at_least(0, **{name: getattr(self, name)})
        if not 0 <= self.randaugment_magnitude < RANDAUGMENT_BINS:
            raise ValueError(f"randaugment_magnitude={self.randaugment_magnitude} must be 0 to {RANDAUGMENT_BINS - 1}")
        if not 0 <= self.random_erasing <= 1:
            raise ValueError(f"random_erasing={self.random_erasing} must be a probability, 0 to 1")
        if self.random_resized_crop is not None and not 0 < self.random_resized_crop <= 1:
            raise ValueError(f"random_resized_crop={self.random_resized_crop} must be above 0 and at most 1")


@dataclass(frozen=True)
class Collate:
    """Make an `ImageBatch` of raw images: scale, transform at random, normalise, mix.

    It is a class of its own so that worker processes can be sent it.
    """

    image_size: int
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: Augment = Augment()

    def __call__(self, raw: tuple[Tensor, Tensor, Tensor]) -> ImageBatch:
        images, labels, index = raw
        augment = self.augment
        if images.shape[-2:] != (self.image_size, self.image_size):
            images = v2.functional.resize(images, [self.image_size, self.image_size], antialias=True)
        if augment.random_resized_crop is not None:
            images = random_resized_crop(images, augment.random_resized_crop)
        images = crop_and_flip(images, augment.crop_padding, augment.horizontal_flip)
        if augment.randaugment_ops:
            images = BatchRandAugment(augment.randaugment_ops, augment.randaugment_magnitude, RANDAUGMENT_BINS)(images)
        images = normalize(images, self.mean, self.std)
        if augment.random_erasing:
            images = random_erase(images, augment.random_erasing)
        if augment.mixup_alpha or augment.cutmix_alpha:
            images, labels = mix(images, labels, self.num_classes, augment.mixup_alpha, augment.cutmix_alpha)
        return ImageBatch(images, labels, index)
