"""Images with their captions and labels: as a dataset's reader returns them, and as batches are cut from them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from apps.base.messages import excerpt
from apps.data.splits import Split
from apps.data.text_files import clean
from apps.multimodal.pairs.images import SKIP_HINT, Images
from apps.vision.batch import Collate, PixelBatch

OnBadRow = Literal["error", "skip"]
"""What becomes of a row without a caption, or whose image is missing or cannot be read."""


class PairBatch(NamedTuple):
    """Pairs of an image and a text.

    Attributes:
        image: float32 (B, C, H, W), normalized by the encoding's constants.
        text_BL: int64 (B, L), token ids of the texts, 0 for padding, which comes after them.
        image_B: int64 (B,), numbers of the images in the data; pairs of one image have one number.
        caption_B: int64 (B,), numbers of the texts; texts that are equal to the model have one number.
        label_BA: int64 (B, A), the class of each attribute, -1 if it is unknown.
        index_B: int64 (B,), places of the pairs in the data.
    """

    image: Tensor
    text_BL: Tensor
    image_B: Tensor
    caption_B: Tensor
    label_BA: Tensor
    index_B: Tensor


@dataclass(frozen=True)
class ReadOptions:
    """The options of `ImageTextData` that a reader needs.

    Attributes:
        attributes: columns that are attributes.
        optional: whether the data may lack them; their values are not known then.
        on_bad_row: what becomes of a bad row.
        table, image_column, image_pattern, caption_column, id_column, split_column: as for `ImageTextData`.
    """

    attributes: tuple[str, ...] = ()
    optional: bool = False
    on_bad_row: OnBadRow = "error"
    table: str | None = None
    image_column: str = "image"
    image_pattern: str = "{}"
    caption_column: str = "caption"
    id_column: str | None = None
    split_column: str | None = None


@dataclass(frozen=True)
class RawPairs:
    """Pairs of an image and a caption, before anything is learned from them.

    Attributes:
        images: the images.
        image_N: int64 (N,), the image of each pair.
        texts: the caption of each pair.
        labels: the value of each attribute for each image, None if unknown.
        split: the split of each image; None if it is to be sampled.
        left_out: number of rows that are not among the pairs, by reason.
        rows: name of the first row of each image, such as ``titles.csv, row 7``; empty if no table names them.
    """

    images: Images
    image_N: NDArray[np.int64]
    texts: list[str]
    labels: Mapping[str, Sequence[str | None]]
    split: list[Split | None]
    left_out: Mapping[str, int] = field(default_factory=dict)
    rows: Sequence[str] = ()

    def without(self, images: Sequence[int], reason: str) -> RawPairs:
        """Return the pairs without the pairs of some images; the images keep their numbers."""
        keep_N = ~np.isin(self.image_N, list(images))
        texts = [text for text, keep in zip(self.texts, keep_N, strict=True) if keep]
        left_out = {**self.left_out, reason: int((~keep_N).sum())}
        return replace(self, image_N=self.image_N[keep_N], texts=texts, left_out=left_out)


def classes_of(pairs: RawPairs, is_train_I: NDArray[np.bool_]) -> dict[str, tuple[str, ...]]:
    """Return the names of the classes of each attribute, sorted: the values that training images have.

    Args:
        pairs: the pairs.
        is_train_I: which images are trained on.

    Raises:
        ValueError: an attribute has fewer than two classes.
    """
    classes = {}
    for name, values in pairs.labels.items():
        known = {value for value, is_train in zip(values, is_train_I, strict=True) if is_train and value is not None}
        if len(known) < 2:
            has = f"only {known.pop()!r}" if known else "no value"
            raise ValueError(f"attribute {name!r} has {has} in the training images: there is nothing to learn")
        classes[name] = tuple(sorted(known))
    return classes


def numbered(pairs: RawPairs, classes: Mapping[str, Sequence[str]]) -> Tensor:
    """Return the class of each attribute of each image, int64 (I, A); -1 if it is unknown or no class."""
    columns = []
    for name, names in classes.items():
        number: dict[str | None, int] = {value: i for i, value in enumerate(names)}
        values = pairs.labels.get(name, [None] * len(pairs.images))
        columns.append(torch.tensor([number.get(value, -1) for value in values]))
    return torch.stack(columns, 1) if columns else torch.empty(len(pairs.images), 0, dtype=torch.int64)


def lacking(label_IA: Tensor, classes: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Return the classes of each attribute that no image has, without the attributes whose classes all have one.

    Args:
        label_IA: int64 (I, A), the class of each attribute of some images, -1 if it is unknown.
        classes: names of the classes of each attribute.
    """
    absent = {}
    for labels, (name, names) in zip(label_IA.unbind(1), classes.items(), strict=True):
        present = set(labels.tolist())
        if without := [value for i, value in enumerate(names) if i not in present]:
            absent[name] = without
    return absent


class PairCollector:
    """Takes the rows of a dataset's tables, checks them, and numbers images.

    Args:
        on_bad_row: end with an error for a row without a caption or whose image is missing, or leave it out.
        attributes: names of the attributes.
        one_caption: whether an image has one caption, and a second one is an error.

    Attributes:
        keys: what tells each image from the others, by its number.
        paths: the file of each image that has one.
    """

    def __init__(self, on_bad_row: OnBadRow, attributes: Sequence[str], one_caption: bool = False) -> None:
        self._on_bad_row, self._one_caption = on_bad_row, one_caption
        self._number: dict[str, int] = {}
        self._attributes = tuple(attributes)
        self._facts: list[dict[str, tuple[Any, str]]] = []  # by image and name: a value and the first row that gives it
        self._first_row: list[str] = []
        self._image_N: list[int] = []
        self._texts: list[str] = []
        self._seen: set[tuple[int, str]] = set()
        self._split: list[Split | None] = []
        self._left_out: Counter[str] = Counter()
        self.keys: list[str] = []
        self.paths: list[Path] = []

    def add(
        self,
        row: str,
        key: str,
        texts: Sequence[str],
        labels: Mapping[str, str],
        split: Split | None = None,
        path: Path | None = None,
    ) -> None:
        """Take one row.

        Args:
            row: name of the row in messages, such as ``titles.csv, row 7``.
            key: tells one image from another; rows of one key are captions of one image.
            texts: captions of the image. One that comes again counts once.
            labels: the value of each attribute; an empty one says nothing, and another row of the image may know it.
            split: the image's split; None: it is to be sampled.
            path: file of the image, which must be there.

        Raises:
            ValueError: the key or a caption is empty or the image missing, unless such rows are left out; or an earlier
                row gives the same image another file, label or split.
        """
        if not key:
            self.refuse(f"{row}: the image's id is empty", "no id")
            return
        captions = [text for text in map(clean, texts) if text]
        if len(captions) < max(1, len(texts)):
            self.refuse(f"{row}: a caption of {excerpt(key)} is empty", "an empty caption")
        if not captions:
            return
        number = self._number.get(key)
        if number is None:
            if path is not None and not path.is_file():
                self.refuse(f"{row}: the image {str(path)!r} is missing", "a missing image")
                return
            number = self._new(row, key, split, path)
        given = {name: label for name in self._attributes if (label := labels[name].strip())}
        facts: dict[str, object] = {"the file": path, **given, "the split": split}
        if self._one_caption:
            facts["the caption"] = captions[0]
        for name, value in facts.items():
            first, first_row = self._facts[number].setdefault(name, (value, row))
            if value != first:
                raise ValueError(
                    f"{row}: {name} of {excerpt(key)} is {_written(value)}, and {_written(first)} in {first_row}"
                )
        for caption in captions:
            if (number, caption) in self._seen:
                self._left_out["a repeated caption"] += 1
                continue
            self._seen.add((number, caption))
            self._image_N.append(number)
            self._texts.append(caption)

    def refuse(self, complaint: str, reason: str) -> None:
        """End with an error for a bad row, or count it as left out for this reason.

        Raises:
            ValueError: bad rows are not left out.
        """
        if self._on_bad_row == "error":
            raise ValueError(f"{complaint}; {SKIP_HINT}")
        self._left_out[reason] += 1

    def pairs(self, images: Images) -> RawPairs:
        """Return the rows taken, with the images of ``keys``."""
        image_N = np.array(self._image_N, np.int64)
        unknown = (None, "")
        labels = {name: [facts.get(name, unknown)[0] for facts in self._facts] for name in self._attributes}
        return RawPairs(images, image_N, self._texts, labels, self._split, dict(self._left_out), self._first_row)

    def _new(self, row: str, key: str, split: Split | None, path: Path | None) -> int:
        number = self._number[key] = len(self.keys)
        self.keys.append(key)
        self._first_row.append(row)
        if path is not None:
            self.paths.append(path)
        self._facts.append({})
        self._split.append(split)
        return number


def _written(value: object) -> str:
    return repr(str(value)) if isinstance(value, Path) else excerpt(value)


@dataclass(frozen=True)
class PairSet(Dataset[PairBatch]):
    """Pairs that are read by whole batches; the images of ``pairs.__getitems__(positions)`` are uint8 (B, C, S, S).

    Attributes:
        read: a function from images' numbers (B,) to their pixels.
        encode: a function from captions' numbers (B,) to their ids.
        image_N: int64 (N,), the image of each pair of the data.
        caption_N: int64 (N,), the caption of each pair of the data.
        label_IA: int64 (I, A), the class of each image's attributes, -1 if it is unknown.
        index: the pairs that the set holds, in its order.
    """

    read: Callable[[Tensor], Tensor]
    encode: Callable[[Tensor], Tensor]
    image_N: Tensor
    caption_N: Tensor
    label_IA: Tensor
    index: Tensor

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, position: int) -> PairBatch:
        return self.__getitems__([position])

    def __getitems__(self, positions: Sequence[int] | Tensor) -> PairBatch:
        index_B = self.index[torch.as_tensor(positions)]
        image_B, caption_B = self.image_N[index_B], self.caption_N[index_B]
        pixels, text_BL = self.read(image_B), self.encode(caption_B)
        return PairBatch(pixels, text_BL, image_B, caption_B, self.label_IA[image_B], index_B)


@dataclass(frozen=True)
class PairCollate:
    """Transforms the images of a batch, which are normalized on the device.

    It is a class so that worker processes can be sent it.

    Attributes:
        images: the transform of the images.
    """

    images: Collate

    def __call__(self, raw: PairBatch) -> PixelBatch:
        pixels = self.images((raw.image, raw.caption_B, raw.index_B))
        pixels.batch = raw._replace(image=pixels.batch.image)
        return pixels
