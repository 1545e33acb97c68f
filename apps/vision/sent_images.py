"""Images that a request brings as base64, such as those of ``moesaic serve``."""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Mapping
from typing import Any

from PIL import Image
from torch import Tensor

from apps.base.messages import excerpt
from apps.vision.image_files import FORMATS, image_of

_MOST_PIXELS = 2**24
"""Pixels of an image: one of 4,096 x 4,096 takes 50 MB while it is scaled."""


def image_schema() -> Mapping[str, Any]:
    """Return the JSON schema of an image."""
    return {
        "type": "string",
        "contentEncoding": "base64",
        "contentMediaType": "image/*",
        "minLength": 1,
        "description": f"A file as base64, of {', '.join(FORMATS)}, of at most {_MOST_PIXELS:,} pixels.",
    }


def sent_pixels(text: str, name: str = "image") -> Tensor:
    """Return an image that is sent as base64 as RGB, uint8 (3, H, W); ``name`` is its name in errors.

    Raises:
        ValueError: no base64, or no image that is read.
    """
    try:
        file = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise ValueError(f"{name}={excerpt(text[:100])} is not base64") from None
    return image_of(file, name, most_pixels=_MOST_PIXELS)


def example_image(size: int) -> str:
    """Return a grey square as base64, for the example of a schema."""
    file = io.BytesIO()
    Image.new("L", (size, size), 128).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()
