"""The encoding of images that a checkpoint keeps: the classes' names, and how pixels become a model's input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor
from torchvision.transforms import v2

import core
from apps.base.checks import check_at_least
from core.config.plain import from_plain, to_plain


@dataclass(frozen=True)
class PixelEncoding:
    """How an image becomes a model's input in evaluation; base of the encodings that a checkpoint keeps.

    Attributes:
        image_size: height and width in pixels.
        in_chans: 1 or 3.
        mean, std: constants of each channel, pixels in [0, 1].
        eval_crop: share of the shorter side that is kept of an image file.

    Raises:
        ValueError: a value out of its range.
    """

    image_size: int
    in_chans: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    eval_crop: float = 1.0

    def __post_init__(self) -> None:
        check_at_least(1, image_size=self.image_size)
        if not 0 < self.eval_crop <= 1:
            raise ValueError(f"eval_crop={self.eval_crop} must be above 0 and at most 1")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != self.in_chans:
                raise ValueError(f"{name}={values} has {len(values)} values for {self.in_chans} channels")
        if min(self.std) <= 0:
            raise ValueError(f"std={self.std} must be positive")

    def state(self) -> dict[str, Any]:
        """Return plain values, for a checkpoint."""
        return to_plain(self, type(self))

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Self:
        """Return the encoding of a checkpoint's ``state()``; a ``ValueError`` says if it has other fields."""
        return from_plain(state, cls, "the checkpoint's encoding")

    @property
    def transform(self) -> v2.Compose:
        """The ``evaluation_transform`` of decoded images."""
        return evaluation_transform(self.image_size, self.in_chans, self.eval_crop)

    def normalized(self, pixels: Tensor, device: Any) -> Tensor:
        """Return scaled images, uint8 (B, C, S, S), as the input of a model on this device."""
        return normalize(pixels.to(device), self.mean, self.std)


@core.register_config
@dataclass(frozen=True)
class ImageEncoding(PixelEncoding):
    """The names of a model's classes, and how an image becomes its input in evaluation.

    Attributes:
        class_names: names by label.
    """

    class_names: tuple[str, ...] = field(kw_only=True)


def check_images(written: Mapping[str, Any], known: Any) -> None:
    """Reject options of the data that contradict a checkpoint.

    Args:
        written: options by name; None if nothing was said.
        known: the checkpoint's encoding, with these names as attributes.

    Raises:
        ValueError: an option has another value.
    """
    for name, value in written.items():
        if value is not None and value != getattr(known, name):
            raise ValueError(
                f"data.{name}={value} is not the checkpoint's, whose images have {name}={getattr(known, name)}: "
                "leave it out"
            )


def evaluation_transform(image_size: int, in_chans: int, eval_crop: float) -> v2.Compose:
    """Scale a decoded image, uint8 (3, H, W), to a model's size, keep the center: uint8 (in_chans, S, S)."""
    cut = [v2.Lambda(middle_of_strip), v2.Resize(round(image_size / eval_crop)), v2.CenterCrop(image_size)]
    return file_transform(cut, in_chans)


def file_transform(cut: Sequence[Any], in_chans: int) -> v2.Compose:
    """Return the transforms ``cut``, followed by one to gray where the model has one channel."""
    return v2.Compose([*cut, v2.Lambda(_gray)] if in_chans == 1 else list(cut))


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return uint8 (B, C, H, W) as float32 of mean 0 and standard deviation 1, by the mean and standard deviation of
    pixels in [0, 1]."""
    center, scale = (torch.tensor(v, dtype=torch.float32) for v in (mean, std))
    factors, shifts = (1 / (255 * scale)).tolist(), (center / scale).tolist()
    out = images.to(torch.float32, copy=True)
    for channel, factor, shift in zip(out.unbind(1), factors, shifts, strict=True):
        channel.mul_(factor).sub_(shift)  # numbers, not tensors: a copy to the device would make the host wait
    return out


def middle_of_strip(image: Tensor) -> Tensor:
    """Cut (C, H, W) to a longer side of at most 8 shorter ones around the center, which is more than a crop keeps.

    Scaled whole by its shorter side, an image of 12,000 x 2 pixels would take gigabytes.
    """
    height, width = image.shape[-2:]
    most = 8 * min(height, width)
    return v2.functional.center_crop(image, [min(height, most), min(width, most)])


def _gray(image: Tensor) -> Tensor:
    """Turn uint8 (3, H, W) into (1, H, W), rounded. On uint8, torchvision cuts the fraction off: a level darker."""
    return v2.functional.rgb_to_grayscale(image.float()).round().to(torch.uint8)
