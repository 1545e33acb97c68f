"""The encoding of images that a checkpoint keeps: the classes' names, and how pixels become a model's input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms import v2

import core
from core.config.plain import from_plain, to_plain


@core.register_config
@dataclass(frozen=True)
class ImageEncoding:
    """The names of a model's classes, and how an image becomes its input in evaluation.

    Attributes:
        class_names: names by label.
        image_size: height and width in pixels.
        in_chans: 1 or 3.
        mean, std: constants of each channel, pixels in [0, 1].
        eval_crop: share of the shorter side that is kept of an image file.
    """

    class_names: tuple[str, ...]
    image_size: int
    in_chans: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    eval_crop: float = 1.0

    def state(self) -> dict[str, Any]:
        """Return plain values, for a checkpoint."""
        return to_plain(self, ImageEncoding)

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> ImageEncoding:
        """Return the encoding of a checkpoint's ``state()``; a ``ValueError`` says if it has other fields."""
        return from_plain(state, ImageEncoding, "the checkpoint's encoding")

    @property
    def transform(self) -> v2.Compose:
        """The ``evaluation_transform`` of decoded images."""
        return evaluation_transform(self.image_size, self.in_chans, self.eval_crop)


def check_images(written: Mapping[str, Any], known: Any) -> None:
    """Refuse options of the data that contradict a checkpoint.

    Args:
        written: options by name; None where nothing was said.
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
    """Scale a decoded image, uint8 (3, H, W), to a model's size, keep the centre: uint8 (in_chans, S, S)."""
    cut = [v2.Lambda(middle_of_strip), v2.Resize(round(image_size / eval_crop)), v2.CenterCrop(image_size)]
    return file_transform(cut, in_chans)


def file_transform(cut: Sequence[Any], in_chans: int) -> v2.Compose:
    """Return the transforms ``cut``, followed by one to grey where the model has one channel."""
    return v2.Compose([*cut, v2.Lambda(_grey)] if in_chans == 1 else list(cut))


def normalize(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Return uint8 (B, C, H, W) as float32 of mean 0 and deviation 1, by those of pixels in [0, 1]."""
    centre, scale = (torch.tensor(v, dtype=torch.float32) for v in (mean, std))
    factors, shifts = (1 / (255 * scale)).tolist(), (centre / scale).tolist()
    out = images.to(torch.float32, copy=True)
    for channel, factor, shift in zip(out.unbind(1), factors, shifts, strict=True):
        channel.mul_(factor).sub_(shift)  # numbers, not tensors: a copy to the device would make the host wait
    return out


def middle_of_strip(image: Tensor) -> Tensor:
    """Cut (C, H, W) to a longer side of at most 8 shorter ones around the centre, which is more than a crop keeps.

    Scaled whole by its shorter side, an image of 12,000 x 2 pixels would take gigabytes.
    """
    height, width = image.shape[-2:]
    most = 8 * min(height, width)
    return v2.functional.center_crop(image, [min(height, most), min(width, most)])


def _grey(image: Tensor) -> Tensor:
    """Turn uint8 (3, H, W) into (1, H, W), rounded. On uint8, torchvision cuts the fraction off: a level darker."""
    return v2.functional.rgb_to_grayscale(image.float()).round().to(torch.uint8)
