"""The batch of an image classifier, and how it is made from raw images."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor
from torchvision.transforms import v2

from apps.vision.augment import (
    RANDAUGMENT_BINS,
    BatchRandAugment,
    Mix,
    crop_and_flip,
    draw_boxes,
    draw_mix,
    erase,
    mix,
    mix_labels,
    random_resized_crop,
)
from apps.vision.encoding import normalize
from core.fields import Bounds, Checked, CountOrZero, NotNegative, PositiveShare, Share


class ImageBatch(NamedTuple):
    """The input and the labels of a vision model.

    Attributes:
        image: float32 (B, C, H, W), normalized to mean 0 and standard deviation 1 by the dataset's constants.
        label: int64 (B,), -1 if there is none; or float32 (B, num_classes) with rows that sum to 1 if images are mixed.
        index: int64 (B,), the position of each image in its file or folder listing.
    """

    image: Tensor
    label: Tensor
    index: Tensor  # type: ignore[assignment]  # a batch has no use for tuple.index


class PixelBatch:
    """A batch on its way to the device: images are uint8 there, a quarter of the bytes of float32.

    Its attributes are the same as in the batch that it becomes. ``image`` is computed when it is asked for, on the
    device of the pixels; ``VisionData.on_after_batch_transfer`` hands Lightning the whole batch that ``finished``
    returns.

    Args:
        batch: a named tuple such as `ImageBatch`, whose ``image`` is uint8 (B, C, H, W).
        mean, std: constants of each channel, for `normalize`.
        box_B4: boxes of ``draw_boxes`` to erase; None: none.
        drawn: how the images are mixed; None: they are not.
    """

    def __init__(
        self,
        batch: Any,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        box_B4: Tensor | None = None,
        drawn: Mix | None = None,
    ) -> None:
        self.batch, self.mean, self.std, self.box_B4, self.drawn = batch, mean, std, box_B4, drawn

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # pickle asks before there is a batch
            raise AttributeError(name)
        return self.finished_image() if name == "image" else getattr(self.batch, name)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.finished())

    def finished_image(self) -> Tensor:
        """Return the images normalized, erased and mixed, (B, C, H, W) of the default dtype."""
        image = normalize(self.batch.image, self.mean, self.std)
        if self.box_B4 is not None:
            image = erase(image, self.box_B4)
        if self.drawn is not None:
            image = mix(image, self.drawn)
        return image.to(torch.get_default_dtype())  # Lightning sets it to a model's own, as under bf16-true

    def finished(self) -> Any:
        """Return the batch with these images."""
        return self.batch._replace(image=self.finished_image())

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PixelBatch:
        """Return the batch on ``device``; Lightning names no ``non_blocking``, which CUDA can always do."""
        non_blocking = non_blocking or torch.device(device).type == "cuda"
        return self._each(lambda part: part.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PixelBatch:
        return self._each(lambda part: part.pin_memory())

    def _each(self, change: Callable[[Tensor], Tensor]) -> PixelBatch:
        batch = type(self.batch)(*(change(part) for part in self.batch))
        box_B4 = None if self.box_B4 is None else change(self.box_B4)
        return PixelBatch(batch, self.mean, self.std, box_B4, self.drawn)


@dataclass(frozen=True)
class Augment(Checked):
    """The random transforms of a training batch; the defaults do nothing. The attributes are options of `VisionData`.

    Raises:
        ValueError: a value out of its range.
    """

    crop_padding: CountOrZero = 0
    horizontal_flip: bool = False
    random_resized_crop: PositiveShare | None = None
    randaugment_ops: CountOrZero = 0
    randaugment_magnitude: Annotated[int, Bounds(0, RANDAUGMENT_BINS)] = 9
    random_erasing: Share = 0.0
    mixup_alpha: NotNegative = 0.0
    cutmix_alpha: NotNegative = 0.0


@dataclass(frozen=True)
class Collate:
    """Make a batch of raw images: scale, transform at random, and leave the rest to the device.

    It is a class of its own so that worker processes can be sent it.
    """

    image_size: int
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    augment: Augment = Augment()

    def __call__(self, raw: tuple[Tensor, Tensor, Tensor]) -> PixelBatch:
        images, labels, index = raw
        augment = self.augment
        if images.shape[-2:] != (self.image_size, self.image_size):
            images = v2.functional.resize(images, [self.image_size, self.image_size], antialias=True)
        if augment.random_resized_crop is not None:
            images = random_resized_crop(images, augment.random_resized_crop)
        images = crop_and_flip(images, augment.crop_padding, augment.horizontal_flip)
        if augment.randaugment_ops:
            images = BatchRandAugment(augment.randaugment_ops, augment.randaugment_magnitude, RANDAUGMENT_BINS)(images)
        box_B4 = draw_boxes(images, augment.random_erasing) if augment.random_erasing else None
        drawn = None
        if augment.mixup_alpha or augment.cutmix_alpha:
            drawn = draw_mix(images, augment.mixup_alpha, augment.cutmix_alpha)
            labels = mix_labels(labels, self.num_classes, drawn.share)
        return PixelBatch(ImageBatch(images, labels, index), self.mean, self.std, box_B4, drawn)
