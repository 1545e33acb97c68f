"""The images of a dataset, wherever they lie, and their scaled pixels in the cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from apps.base.progress import each
from apps.data.array_files import ArrayFiles, ArrayWriter
from apps.data.store import EncodedStore, identity
from apps.vision.image_files import BadImage, image_of, read_image

STORE = EncodedStore("images", version=1)
"""Images that are decoded and scaled."""

SKIP_HINT = "data.on_bad_row=skip leaves such rows out"
"""Advice that ends the message about a bad row."""

_CHUNK = 1024


class Images(Protocol):
    """The images of a dataset, by number."""

    def __len__(self) -> int:
        """Return the number of images."""

    def name(self, number: int) -> str:
        """Return the image's name for people and in predictions, such as its path."""

    def decode(self, number: int) -> Tensor:
        """Return the image as RGB, uint8 (3, H, W).

        Raises:
            BadImage: it cannot be decoded.
        """

    def identity(self) -> list[Any]:
        """Return plain values that change when the images do."""


@dataclass(frozen=True)
class ImageFiles:
    """Images that are files of their own.

    Attributes:
        paths: path of each image.
    """

    paths: tuple[Path, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, number: int) -> str:
        return str(self.paths[number])

    def decode(self, number: int) -> Tensor:
        return read_image(str(self.paths[number]))

    def identity(self) -> list[Any]:
        return identity(self.paths)


@dataclass(frozen=True)
class PackedImages:
    """Image files that lie one after the other in one array.

    Attributes:
        path: file that the array was read from.
        data: uint8, the bytes of all files.
        begin, end: int64 (N,), the bounds of each file in it.
        names: name of each image.
    """

    path: Path
    data: NDArray[np.uint8]
    begin: NDArray[np.int64]
    end: NDArray[np.int64]
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)

    def name(self, number: int) -> str:
        return self.names[number]

    def decode(self, number: int) -> Tensor:
        file = self.data[self.begin[number] : self.end[number]].tobytes()
        return image_of(file, f"{self.path}: image {self.names[number]!r}")

    def identity(self) -> list[Any]:
        return [identity([self.path]), list(self.names)]


@dataclass(frozen=True)
class DrawnImages:
    """Images of one size that are in memory, in no file.

    Attributes:
        pixels: uint8 (N, 3, H, W).
    """

    pixels: Tensor

    def __len__(self) -> int:
        return len(self.pixels)

    def name(self, number: int) -> str:
        return f"image {number}"

    def decode(self, number: int) -> Tensor:
        return self.pixels[number]

    def identity(self) -> list[Any]:
        return []


@dataclass(frozen=True)
class ScaledPixels:
    """Pixels in the cache, read by ``pixels(index_B)`` as uint8 (B, C, S, S).

    It can be sent to another process, which maps the file again.

    Attributes:
        files: as ``store_pixels`` left them.
    """

    files: ArrayFiles

    def __call__(self, index_B: Tensor) -> Tensor:
        return self.files["pixels"][index_B]

    @property
    def bad(self) -> dict[int, str]:
        """A complaint about each image that cannot be decoded, by its number; its pixels are 0."""
        return {int(number): complaint for number, complaint in self.files.info["bad"].items()}


@dataclass(frozen=True)
class DecodedPixels:
    """Pixels that are decoded and scaled whenever they are read, as uint8 (B, C, S, S).

    Attributes:
        images: the images.
        transform: from a decoded image to its scaled pixels.
        rows: name of the row of each image, for messages; empty if no table names them.
    """

    images: Images
    transform: Callable[[Tensor], Tensor]
    rows: Sequence[str] = ()

    def __call__(self, index_B: Tensor) -> Tensor:
        return torch.stack([self._one(number) for number in index_B.tolist()])

    def _one(self, number: int) -> Tensor:
        try:
            return self.transform(self.images.decode(number))
        except BadImage as error:
            raise BadImage(f"{with_row(self.rows, number, str(error))}; {SKIP_HINT}") from error

    def bad(self, num_threads: int) -> dict[int, str]:
        """Decode all images once; return a complaint about each one that cannot be, by its number."""
        return _each_image(self.images, lambda number: self.images.decode(number) is None, num_threads)


def with_row(rows: Sequence[str], number: int, complaint: str) -> str:
    """Return a complaint about an image with the name of its row, if there are rows."""
    return f"{rows[number]}: {complaint}" if rows else complaint


def store_pixels(
    images: Images,
    transform: Callable[[Tensor], Tensor],
    shape: Sequence[int],
    cache: Path,
    name: str,
    made_from: Any,
    num_threads: int,
) -> ScaledPixels:
    """Decode and scale all images into the cache, unless they are there.

    Args:
        images: the images.
        transform: from a decoded image, uint8 (3, H, W), to its scaled pixels.
        shape: (C, S, S) of the scaled pixels.
        cache: the cache's folder.
        name: name of the data, for people who look into the cache.
        made_from: plain values that describe the transform.
        num_threads: threads that decode.

    Raises:
        ValueError: an image's file is missing.
        DataError: the cache cannot be written, or the disk is full.
    """

    def write(writer: ArrayWriter) -> None:
        pixels = writer.create("pixels", (len(images), *shape), np.uint8)

        def one(number: int) -> None:
            pixels[number] = transform(images.decode(number)).numpy()

        writer.finish({"bad": _each_image(images, one, num_threads)})

    return ScaledPixels(STORE.open(cache, name, [images.identity(), list(shape), made_from], write))


def _each_image(images: Images, do: Callable[[int], Any], num_threads: int) -> dict[int, str]:
    """Do something with each image; return the complaints about those that cannot be decoded."""

    def complaint(number: int) -> str | None:
        try:
            do(number)
        except BadImage as error:
            return str(error)
        return None

    complaints = {}
    with ThreadPoolExecutor(max(1, num_threads)) as pool:
        chunks = range(0, len(images), _CHUNK)  # a future for each of a million images would take a gigabyte
        for start in each(chunks, f"decoding {len(images):,} images"):
            numbers = range(start, min(start + _CHUNK, len(images)))
            found = zip(numbers, pool.map(complaint, numbers), strict=True)
            complaints.update({number: text for number, text in found if text is not None})
    return complaints
