"""Inputs of ``moesaic predict`` instead of the data's pairs: images, texts, or a search among images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from apps.base.messages import excerpt
from apps.data.loader import in_order
from apps.data.text_files import clean, text_lines
from apps.multimodal.pairs.encoding import PairEncoding, TextEncoding
from apps.multimodal.pairs.pairs import PairBatch
from apps.multimodal.readers.rows import ENDINGS, as_text, as_texts, kind_of, rows_of
from apps.multimodal.search.image_index import tell
from apps.multimodal.search.vectors import (
    FileBatch,
    FolderImages,
    OnBadImage,
    list_images,
    readable,
    vectors_of_pixels,
)
from core.fields import Checked, Count

TOP = 10
"""Images of a query, where nothing else is said."""


@dataclass(frozen=True)
class GivenInputs(Checked):
    """The inputs of a prediction that are not the data's own; all None: there are none.

    Attributes:
        images: folder of images; those in folders below it count too.
        predict_file: table of texts, or a .txt file with one text per line.
        query: texts by which the images are searched; one text may be given without a list.
        query_image: image files by which they are searched, instead of texts.
        top: maximum number of images per query; None: 10.
        index: file of the images' vectors, for a search; None: one in the cache.
        on_bad_image: handling of an image of the folder that cannot be read.
        caption_column: column of the table that holds a text or a list of texts.
        id_column: column of the table to put next to each vector; None: none does.

    Raises:
        ValueError: images with a file of texts, texts and images to search by, a search without a folder, options of a
            search without one, an empty text to search by, or a value out of its range.
    """

    images: str | None = None
    predict_file: str | None = None
    query: tuple[str, ...] | list[str] | str | None = None
    query_image: tuple[str, ...] | list[str] | str | None = None
    top: Count | None = None
    index: str | None = None
    on_bad_image: OnBadImage = "skip"
    caption_column: str = "caption"
    id_column: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.images is not None and self.predict_file is not None:
            raise ValueError(f"images={self.images!r} and predict_file={self.predict_file!r}: give one of them")
        if not self.is_search:
            for name, value in (("top", self.top), ("index", self.index)):
                if value is not None:
                    raise ValueError(f"{name}={value} is of a search, which needs data.query or data.query_image")
            return
        if self.query is not None and self.query_image is not None:
            raise ValueError("query and query_image are both given: search by texts or by images, not by both")
        name = "query" if self.query_image is None else "query_image"
        if not self.queries:
            raise ValueError(f"{name} is an empty list")
        if self.images is None:
            raise ValueError(f"{name}={excerpt(self.queries[0])} needs data.images, the folder that is searched")
        for number, text in enumerate(self.queries, 1):
            if not clean(text):
                raise ValueError(f"{name} {number} of {len(self.queries)} is empty")

    @property
    def is_search(self) -> bool:
        """Whether the images are searched."""
        return self.query is not None or self.query_image is not None

    @property
    def replaces_pairs(self) -> bool:
        """Whether the data's own pairs are not needed."""
        return self.images is not None or self.predict_file is not None

    @property
    def queries(self) -> tuple[str, ...]:
        """The texts, or the paths of the images, to search by."""
        value = self.query if self.query_image is None else self.query_image
        return (value,) if isinstance(value, str) else tuple(value or ())

    @property
    def folder(self) -> Path:
        """The folder of images."""
        assert self.images is not None
        return Path(self.images).expanduser()

    def loader(self, encoding: PairEncoding, batch_size: int, num_workers: int) -> DataLoader[Any]:
        """Return the images or the texts in batches, ``FileBatch`` or ``TextBatch``.

        Raises:
            ValueError: there is no folder, no image in it, or the file cannot be read.
        """
        rows: Dataset[Any]
        if self.images is not None:
            rows = FolderImages(self.folder, list_images(self.folder), encoding, self.on_bad_image)
        else:
            assert self.predict_file is not None
            path = Path(self.predict_file).expanduser()
            ids, texts = read_texts(path, self.caption_column, self.id_column)
            rows = GivenTexts(ids, texts, encoding.text)
        return in_order(rows, batch_size, num_workers)


class TextBatch(NamedTuple):
    """Texts of a file.

    Attributes:
        index: their numbers in the file, from 0.
        id: values of the id column; None without one.
        text: the texts.
        text_BL: int64 (B, L), their ids, padded with 0.
    """

    index: list[int]  # type: ignore[assignment]  # a batch has no use for tuple.index
    id: list[str] | None
    text: list[str]
    text_BL: Tensor


@dataclass(frozen=True)
class GivenTexts(Dataset[Any]):
    """Texts that are encoded when they are read: ``__getitems__(positions)`` is a ``TextBatch``.

    Attributes:
        ids: values of the id column; None without one.
        texts: the texts.
        encoding: how they become ids.
    """

    ids: Sequence[str] | None
    texts: Sequence[str]
    encoding: TextEncoding

    def __len__(self) -> int:
        return len(self.texts)

    def __getitems__(self, positions: Sequence[int]) -> TextBatch:
        index = [int(i) for i in positions]
        texts = [self.texts[i] for i in index]
        ids = None if self.ids is None else [self.ids[i] for i in index]
        return TextBatch(index, ids, texts, self.encoding.encode(texts))


def read_texts(path: Path, column: str, id_column: str | None) -> tuple[list[str] | None, list[str]]:
    """Return the ids, or None, and the texts of a file.

    Args:
        path: a table, or a .txt file with one text per line.
        column: the table's column of texts, or of lists of texts.
        id_column: its column of ids; None: there is none.

    Raises:
        ValueError: the file has another kind or cannot be read, a column is missing, or a text is empty.
    """
    ids, texts = list[str](), list[str]()
    if path.suffix.lower() == ".txt":
        if id_column is not None:
            raise ValueError(f"id_column={id_column!r} is of a table, and {path} is a text file")
        rows = (("", f"{path}, line {i}", [line]) for i, line in enumerate(text_lines(path), 1))
    elif kind_of(path) is not None:
        roles = {column: "caption_column", **({} if id_column is None else {id_column: "id_column"})}
        rows = (
            (
                "" if id_column is None else as_text(values[id_column], row, id_column),
                row,
                as_texts(values[column], row, column),
            )
            for row, values in rows_of(path, roles)
        )
    else:
        raise ValueError(f"predict_file={str(path)!r} is no {', '.join((*ENDINGS, '.txt'))} file")
    for own, row, of_row in rows:
        for text in map(clean, of_row):
            if not text:
                raise ValueError(f"{row}: the text is empty")
            ids.append(own)
            texts.append(text)
    if not texts:
        raise ValueError(f"predict_file={str(path)!r} has no text")
    return (None if id_column is None else ids), texts


# ---- writing them


def columns_of(model: Any, batch: PairBatch | FileBatch | TextBatch, data: Any) -> dict[str, Any]:
    """Return the columns of a batch: ``index``, what names the rows, and ``image_vector`` and ``text_vector``.

    Args:
        model: as in ``vectors.encode_images``; it gives a batch's by a call.
        batch: pairs, with the columns ``image``, a name, and ``text``; images of a folder, with ``image``, their path
            in it; or texts, with ``text`` and, if they have one, ``id``. Images that cannot be read have no row.
        data: names the images and texts of pairs by ``image_name(number)`` and ``texts``; other data name none.
    """
    import pyarrow as pa

    def texts(values: list[str]) -> Any:
        return pa.array(values, pa.string())  # a batch without a row has the type too

    if isinstance(batch, FileBatch):
        tell(batch.complaints)
        vectors_BD = vectors_of_pixels(model, batch.pixels) if batch.index else torch.empty(0, model.dim)
        return {
            "index": _numbers(batch.index),
            "image": texts(list(map(readable, batch.path))),
            "image_vector": vectors_BD,
        }
    if isinstance(batch, TextBatch):
        named = {} if batch.id is None else {"id": texts(batch.id)}
        vectors_BD = model.text_vectors(batch.text_BL.to(model.device)).float()
        return {"index": _numbers(batch.index), **named, "text": texts(batch.text), "text_vector": vectors_BD}
    columns: dict[str, Any] = {"index": batch.index_B}
    if hasattr(data, "image_name"):
        columns["image"] = texts([data.image_name(number) for number in batch.image_B.tolist()])
    if hasattr(data, "texts"):
        columns["text"] = texts([data.texts[number] for number in batch.caption_B.tolist()])
    image_BD, text_BD, *_ = model(batch.image, batch.text_BL)
    return {**columns, "image_vector": image_BD.float(), "text_vector": text_BD.float()}


def _numbers(index: list[int]) -> torch.Tensor:
    return torch.tensor(index, dtype=torch.int64)
