"""An image as a model's input, and images without data."""

from __future__ import annotations

import base64
import binascii
import io
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from apps.base.messages import excerpt
from apps.report.exhibit import ImageField
from apps.task import Input
from apps.vision.image_files import FORMATS, image_of, to_pixels

_MOST_PIXELS = 2**24
"""Pixels of an image: one of 4,096 x 4,096 takes 50 MB while it is scaled."""


def image_input(encoding: Any, may_be_empty: bool = False) -> Input:
    """Return an image, whose value is its pixels as a model's evaluation scales and cuts them, uint8 (C, S, S).

    Args:
        encoding: the scaling, with ``transform`` and ``image_size``.
        may_be_empty: whether a page takes none.
    """
    transform, example = encoding.transform, io.BytesIO()
    Image.new("L", (encoding.image_size, encoding.image_size), 128).save(example, "PNG")
    schema = {
        "type": "string",
        "contentEncoding": "base64",
        "contentMediaType": "image/*",
        "minLength": 1,
        "description": f"A file as base64, of {', '.join(FORMATS)}, of at most {_MOST_PIXELS:,} pixels.",
    }
    return Input(
        schema,
        base64.b64encode(example.getvalue()).decode(),
        lambda plain, name: transform(_sent(plain, name)),
        ImageField("Image", may_be_empty),
        lambda path: None if path is None else transform(to_pixels(path, "the image")),
    )


def _sent(text: str, name: str) -> Tensor:
    """Return an image that is sent as base64 as RGB, uint8 (3, H, W)."""
    try:
        file = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise ValueError(f"{name}={excerpt(text[:100])} is not base64") from None
    return image_of(file, name, most_pixels=_MOST_PIXELS)


def drawn_images(model: Any, number: int = 2) -> Tensor:
    """Return images of random numbers, for the example of a graph."""
    draw = torch.Generator().manual_seed(0)
    return torch.randn(number, model.in_chans, model.image_size, model.image_size, generator=draw)


def images_on_meta(model: Any, number: int, dtype: torch.dtype) -> Tensor:
    """Return images without values."""
    return torch.empty(number, model.in_chans, model.image_size, model.image_size, device="meta", dtype=dtype)
