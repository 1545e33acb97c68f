"""Image files, Pillow images and arrays as uint8 tensors. Anything else is one ValueError that names it."""

from __future__ import annotations

import contextlib
import errno
import io
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.v2.functional import to_dtype

from apps.base.messages import one_line
from apps.vision.image_set import ImageSet

ENDINGS = (*IMG_EXTENSIONS, ".gif", ".jfif", ".jpe")
"""Endings of image files."""
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
"""Pillow's names of the formats that are read from a request; bytes from a stranger are not tried as any other."""

_MOST_KEPT = 2 << 30
"""Bytes of decoded pixels that are kept of a split: 170,000 images of 64 x 64 pixels."""


class BadImage(ValueError):
    """A file that is missing or holds no image, or an image that is cut, damaged, too large or of 32 bits."""


def read_image(path: str) -> Tensor:
    """Return the image as RGB, uint8 (3, H, W), turned as its EXIF orientation says.

    A channel of 16 bits gives its upper 8 bits, and an animation its first frame. Transparency is dropped: a pixel
    keeps the color that the file gives it.

    Raises:
        BadImage: the file does not exist, it is not an image, is cut or too large, or its pixels have 32 bits.
        ValueError: the file cannot be opened.
    """
    # Pillow reads the header, for 0.03 to 0.08 ms: it rejects a small file that unpacks to too much.
    with _named(path), Image.open(path) as image:
        return _decoded(path, image, path)


def image_of(file: bytes, name: str, formats: Sequence[str] = FORMATS, most_pixels: float = math.inf) -> Tensor:
    """Return the image of a file's bytes as ``read_image`` does of a path.

    Args:
        file: the bytes.
        name: name in errors.
        formats: Pillow's names of the formats that are read.
        most_pixels: maximum number of pixels of an image; a larger one is not decoded.

    Raises:
        BadImage: no image of these formats, or one that is cut, damaged or too large.
    """
    with _named(name), Image.open(io.BytesIO(file), formats=tuple(formats)) as image:
        if image.width * image.height > most_pixels:
            raise BadImage(f"{name} has {image.width} x {image.height} pixels: at most {most_pixels:,} are read")
        return _decoded(torch.frombuffer(bytearray(file), dtype=torch.uint8), image, name)


def _decoded(file: str | Tensor, image: Image.Image, name: str) -> Tensor:
    """Return the pixels of a file, given by its path or its bytes, which Pillow has opened."""
    if image.format == "WEBP" and ExifTags.Base.Orientation in image.getexif():
        return _of_pillow(image, name)  # torchvision turns JPEG and PNG only
    if image.format == "GIF" and "transparency" in image.info:
        return _of_pillow(image, name)  # torchvision paints a background
    with contextlib.suppress(RuntimeError):
        # This takes a third of Pillow's time, but reads a few formats only.
        pixels = decode_image(file, ImageReadMode.RGB, apply_exif_orientation=True)
        pixels = pixels[0] if pixels.ndim == 4 else pixels  # the first frame of an animation
        return pixels if pixels.dtype == torch.uint8 else to_dtype(pixels, torch.uint8, scale=True)
    return _of_pillow(image, name)


def to_pixels(image: Any, name: str) -> Tensor:
    """Return the image as RGB, uint8 (3, H, W).

    Args:
        image: a path, an image of Pillow's, or a uint8 array (H, W), (H, W, 1), (H, W, 3) or (H, W, 4).
        name: name in errors of an image without a path.

    Raises:
        ValueError: anything else, or an image that cannot be read.
    """
    if isinstance(image, (str, Path)):
        return read_image(str(image))
    if isinstance(image, Image.Image):
        with _named(name):
            return _of_pillow(image, name)
    if not isinstance(image, np.ndarray):
        raise ValueError(f"{name} is of type {type(image).__name__}, not a path, a PIL image or a uint8 array")
    channels = image.shape[2:] if image.ndim == 3 else (1,) if image.ndim == 2 else ()
    if image.dtype != np.uint8 or channels not in ((1,), (3,), (4,)) or not image.size:
        raise ValueError(f"{name} is {image.dtype} {image.shape}: an array must be uint8, (H, W) or (H, W, 3)")
    pixels = torch.from_numpy(image.reshape(*image.shape[:2], *channels).copy()).permute(2, 0, 1)
    return pixels.expand(3, -1, -1) if len(pixels) == 1 else pixels[:3]


def scaled(images: Sequence[Any], transform: Callable[[Tensor], Tensor], start: int = 0) -> Tensor:
    """Return images as a model's ``transform`` scales and cuts them, uint8 (B, C, S, S).

    Args:
        images: as ``to_pixels`` takes them; at least one.
        transform: from uint8 (3, H, W) to (C, S, S).
        start: number of the first one, for errors.

    Raises:
        ValueError: an image that cannot be read.
    """
    return torch.stack([transform(to_pixels(image, f"images[{i}]")) for i, image in enumerate(images, start)])


def to_array(pixels: Tensor) -> np.ndarray:
    """Return pixels (C, H, W) as an array (H, W) or (H, W, 3)."""
    return np.ascontiguousarray(pixels.permute(1, 2, 0).squeeze(-1).numpy())


@contextlib.contextmanager
def _named(name: str) -> Iterator[None]:
    """Name the image in its errors."""
    try:
        yield
    except (BadImage, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise BadImage(f"{name} is too large: {error}") from error
    except Exception as error:  # a damaged file makes Pillow's readers raise nearly anything
        if isinstance(error, OSError) and error.errno is not None:  # the system's, not the content's
            kind = BadImage if error.errno in (errno.ENOENT, errno.ELOOP) else ValueError  # a link to nothing
            raise kind(f"{name} cannot be read: {error.strerror}") from error
        reason = "it is no image" if isinstance(error, UnidentifiedImageError) else one_line(str(error))
        raise BadImage(f"{name} is corrupt: {reason}") from error


def _of_pillow(image: Image.Image, name: str) -> Tensor:
    turned = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        return _upper_bits(turned, image.format, name).expand(3, -1, -1)
    return torch.from_numpy(np.array(turned.convert("RGB"))).permute(2, 0, 1)


def _upper_bits(image: Image.Image, file_format: str | None, path: str) -> Tensor:
    """Turn gray pixels of 16 bits into uint8 (1, H, W). Pillow's ``convert`` would cut all above 255 off."""
    # For PNG and PPM files some versions of Pillow give 16 bits as mode I, which otherwise means 32 bits.
    if not (image.mode.startswith("I;16") or (image.mode == "I" and file_format in ("PNG", "PPM"))):
        raise BadImage(f"{path} has pixels of 32 bits (mode {image.mode}) and no rule for their range: save it with 16")
    return torch.from_numpy((np.array(image) >> 8).astype(np.uint8))[None]


class KeptPixels:
    """Pixels of images, uint8 (N, C, S, S), each kept once it has been decoded, in a map of a file without a name,
    which forked workers of a loader share.

    Args:
        pixels_N: the map.
        is_kept_N: uint8 (N,), 1 for those that are there.
    """

    def __init__(self, pixels_N: Tensor, is_kept_N: Tensor) -> None:
        self._pixels_N, self._is_kept_N = pixels_N, is_kept_N

    @classmethod
    def of(cls, count: int, shape: Sequence[int]) -> KeptPixels | None:
        """Return the room for ``count`` images of a shape, with none in it; None if they are too many, or no disk is
        free for them."""
        size = count * (math.prod(shape) + 1)
        if not 0 < size <= _MOST_KEPT or not hasattr(os, "posix_fallocate"):
            return None
        try:
            with tempfile.NamedTemporaryFile() as file:
                os.posix_fallocate(file.fileno(), 0, size)  # a full disk would end the process later
                whole = torch.from_file(file.name, shared=True, size=size, dtype=torch.uint8)
        except OSError:
            return None
        return cls(whole[count:].view(count, *shape), whole[:count])

    def read(self, index_B: Tensor, decode: Callable[[int], Tensor]) -> Tensor:
        """Return the images at ``index_B``, uint8 (B, C, S, S); ``decode`` returns one, (C, S, S)."""
        for i in index_B[self._is_kept_N[index_B] == 0].tolist():
            self._pixels_N[i] = decode(i)
            self._is_kept_N[i] = 1
        return self._pixels_N[index_B]


@dataclass(frozen=True)
class FromFiles:
    """Image files, each decoded, cut and scaled by ``transform`` to uint8 (3, H, W).

    Attributes:
        paths: the files.
        transform: of a decoded image.
        kept: where pixels are kept, so that each file is decoded once; None: it is decoded each time.
    """

    paths: tuple[str, ...]
    transform: Callable[[Tensor], Tensor]
    kept: KeptPixels | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "kept": None}

    def __call__(self, index: Tensor) -> Tensor:
        try:
            if self.kept is not None:
                return self.kept.read(index, self._decoded)
            return torch.stack([self._decoded(i) for i in index.tolist()])
        except BadImage as error:
            raise BadImage(f"{error}; data.on_bad_image=skip leaves such images out") from error

    def _decoded(self, i: int) -> Tensor:
        return self.transform(read_image(self.paths[i]))


def without_bad_images(images: ImageSet, num_threads: int) -> tuple[ImageSet, list[str]]:
    """Decode all images once; return those that can be read, in their order, and a complaint about each other one."""
    read = images.read
    if not isinstance(read, FromFiles):
        return images, []

    def complaint(i: int) -> str | None:
        try:
            read_image(read.paths[i])
        except BadImage as error:
            return str(error)
        return None

    complaints: list[str | None] = []
    with ThreadPoolExecutor(num_threads) as pool:
        for some_of_them in images.index.split(4096):  # a future for each of a million would take a gigabyte
            complaints += pool.map(complaint, some_of_them.tolist())
    kept = torch.tensor([c is None for c in complaints], dtype=torch.bool)
    return images.subset(kept.nonzero().squeeze(1)), [c for c in complaints if c is not None]
