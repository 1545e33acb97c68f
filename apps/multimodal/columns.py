"""The columns that ``moesaic predict`` writes: the vectors of pairs, of a folder's images, or of a file's texts."""

from __future__ import annotations

from typing import Any

import torch

from apps.multimodal.batch import PairBatch
from apps.multimodal.given import TextBatch
from apps.multimodal.image_index import tell
from apps.multimodal.vectors import FileBatch, readable, vectors_of_pixels


def columns_of(model: Any, batch: PairBatch | FileBatch | TextBatch, data: Any) -> dict[str, Any]:
    """Return the columns of a batch: ``index``, what names the rows, and ``image_vector`` and ``text_vector``.

    Args:
        model: as in ``vectors.encode_images``; it gives a batch's by a call.
        batch: pairs, with the columns ``image``, a name, and ``text``; images of a folder, with ``image``, their path
            in it; or texts, with ``text`` and, where they have one, ``id``. Images that cannot be read have no row.
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
