"""Images and texts as a model's vectors, and the images of a folder as batches."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from apps.multimodal.pairs.encoding import PairEncoding
from apps.vision.image_files import ENDINGS, BadImage, read_image, scaled
from apps.vision.image_folders import images_below
from core.convert.read.calls import evaluating

OnBadImage = Literal["error", "skip"]
"""What an image is that cannot be read: the end of the run, or left out with a line."""

_IMAGES_AT_ONCE, _TEXTS_AT_ONCE = 64, 256


def encode_images(model: Any, images: Sequence[Any]) -> Tensor:
    """Return a vector of each image, float32 (N, dim) of length 1, on the CPU.

    Args:
        model: a module with ``dim``, ``encoding``, ``device`` and ``image_vectors`` of normalized images.
        images: paths, images of Pillow's, or uint8 arrays (H, W) or (H, W, 3), mixed as you like.

    Raises:
        ValueError: an image that cannot be read, by its name or place; a single image outside a list.
    """
    check_list("images", images)
    transform = model.encoding.transform

    def pixels(start: int) -> Tensor:
        some = images[start : start + _IMAGES_AT_ONCE]
        return scaled(some, transform, start)

    with evaluating(model), torch.no_grad():
        parts = [vectors_of_pixels(model, pixels(i)) for i in range(0, len(images), _IMAGES_AT_ONCE)]
    return torch.cat([torch.empty(0, model.dim), *parts])


def encode_texts(model: Any, texts: Sequence[str]) -> Tensor:
    """Return a vector of each text, float32 (N, dim) of length 1, on the CPU; of a long one the first tokens are read.

    Args:
        model: likewise, with ``text_vectors`` of texts' ids.
        texts: texts of one word or more.

    Raises:
        ValueError: a text that is none, or is empty; one text instead of a list.
    """
    check_list("texts", texts)
    for i, text in enumerate(texts):
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"texts[{i}]={text!r} is no text, or is empty")
    encoding = model.encoding.text
    with evaluating(model), torch.no_grad():
        ids = (encoding.encode(texts[i : i + _TEXTS_AT_ONCE]) for i in range(0, len(texts), _TEXTS_AT_ONCE))
        parts = [model.text_vectors(part_BL.to(model.device)).float().cpu() for part_BL in ids]
    return torch.cat([torch.empty(0, model.dim), *parts])


def vectors_of_pixels(model: Any, pixels: Tensor) -> Tensor:
    """Return the vectors of scaled images, uint8 (B, C, S, S): float32 (B, dim) on the CPU."""
    return model.image_vectors(model.encoding.normalized(pixels, model.device)).float().cpu()


def check_list(name: str, items: Any) -> None:
    """Reject one thing instead of a list of them.

    Raises:
        ValueError: naming the argument.
    """
    if isinstance(items, (str, bytes, os.PathLike)) or not hasattr(items, "__len__") or hasattr(items, "ndim"):
        raise ValueError(f"{name} must be a list: write [{name[:-1]}] for one {name[:-1]}")


# ---- folders of images


class FileBatch(NamedTuple):
    """Images of a folder.

    Attributes:
        index: places of the images in the listing of the folder.
        path: their paths, relative to the folder.
        pixels: uint8 (B, C, S, S), scaled.
        complaints: a line about each further image that cannot be read.
    """

    index: list[int]  # type: ignore[assignment]  # a batch has no use for tuple.index
    path: list[str]
    pixels: Tensor
    complaints: list[str]


@dataclass(frozen=True)
class FolderImages(Dataset[Any]):
    """Images of a folder, decoded and scaled when they are read: ``__getitems__(positions)`` is a ``FileBatch``.

    Attributes:
        folder: the folder.
        paths: paths of the images, relative to it.
        encoding: how they are scaled.
        on_bad_image: handling of an image that cannot be read.
    """

    folder: Path
    paths: Sequence[str]
    encoding: PairEncoding
    on_bad_image: OnBadImage = "skip"

    def __len__(self) -> int:
        return len(self.paths)

    def __getitems__(self, positions: Sequence[int]) -> FileBatch:
        encoding, transform = self.encoding, self.encoding.transform
        index, pixels, complaints = [], [], []
        for i in positions:
            try:
                pixels.append(transform(read_image(str(self.folder / self.paths[i]))))
                index.append(int(i))
            except BadImage as error:
                if self.on_bad_image == "error":
                    raise BadImage(f"{error}; data.on_bad_image=skip leaves such images out") from error
                complaints.append(str(error))
        size = encoding.image_size
        none = torch.empty(0, encoding.in_chans, size, size, dtype=torch.uint8)
        return FileBatch(index, [self.paths[i] for i in index], torch.stack(pixels) if pixels else none, complaints)


def list_images(folder: Path) -> list[str]:
    """Return the image files in a folder and below it, sorted, relative to it; hidden ones are left out.

    Raises:
        ValueError: there is none, or no such folder.
    """
    if not folder.is_dir():
        raise ValueError(f"images={str(folder)!r} is no folder")
    paths = sorted(os.path.relpath(path, folder) for path in images_below(folder))
    if not paths:
        raise ValueError(f"images={str(folder)!r} holds no image; images end in {', '.join(ENDINGS)}")
    return paths


def readable(path: str) -> str:
    """Return a path as text that can be printed and written: bytes of its name that are not UTF-8 become U+FFFD."""
    return os.fsencode(path).decode("utf-8", "replace")
