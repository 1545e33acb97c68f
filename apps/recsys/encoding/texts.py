"""Columns of text as columns of vectors, by a frozen sentence encoder."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from apps.base.progress import bar
from apps.recsys.encoding.categories import MISSING, factorize
from apps.recsys.encoding.table_encoding import TextEncoding
from apps.recsys.schema import TextConfig

_AT_A_TIME = 1024


@dataclass(frozen=True)
class _Encoder:
    """An encoder that has been read.

    Attributes:
        encode: maps texts, and the largest number of tokens of each, to vectors float32 (N, D).
        digest: hash of the weights.
    """

    encode: Callable[[Sequence[str], int], torch.Tensor]
    digest: str


def encoder_folder(config: TextConfig, column: str) -> Path:
    """Return the folder of a column's encoder.

    Raises:
        ValueError: there is none.
    """
    from apps.porting import sentences

    return sentences.encoder_folder(config.encoder, f"texts[{column!r}].encoder")


def files_of_encoders(texts: Mapping[str, TextConfig]) -> list[Path]:
    """Return the files of the encoders of columns of text.

    Raises:
        ValueError: an encoder is missing.
    """
    folders = {encoder_folder(config, column) for column, config in texts.items()}
    return sorted(path for folder in folders for path in folder.iterdir() if path.is_file())


def text_encodings(texts: Mapping[str, TextConfig]) -> dict[str, TextEncoding]:
    """Return the encoders of columns of text, which are read here.

    Raises:
        ValueError: an encoder is missing, or none that can be read.
    """
    return {
        column: TextEncoding(config, _opened(encoder_folder(config, column)).digest) for column, config in texts.items()
    }


def with_vectors(table: pa.Table, texts: Mapping[str, TextEncoding], where: str) -> pa.Table:
    """Return a table with vectors in the place of the columns of text; a missing text is a missing vector.

    Args:
        table: the rows.
        texts: the columns of text.
        where: what to call the table in messages.

    Raises:
        ValueError: an encoder is missing or differs from the training's, or a column holds no text.
    """
    for column, text in texts.items():
        encoder = _opened(encoder_folder(text.config, column))
        if encoder.digest != text.digest:
            raise ValueError(
                f"texts[{column!r}]: the encoder in {encoder_folder(text.config, column)} is not that of the training"
            )
        codes = factorize([(where, table.column(column))], column)
        values = codes.values.to_pylist()
        parts = []
        with bar(f"texts of {column}", len(values)) as shown:
            for start in range(0, len(values), _AT_A_TIME):
                part = values[start : start + _AT_A_TIME]
                parts.append(encoder.encode(part, text.config.max_tokens).numpy())
                shown.advance(len(part))
        width = parts[0].shape[1] if parts else 1
        vectors_MD = np.concatenate([*parts, np.zeros((1, width), np.float32)])
        flat = pa.array(vectors_MD[codes.codes].ravel())
        vectors = pa.FixedSizeListArray.from_arrays(flat, width, mask=pa.array(codes.codes == MISSING))
        table = table.set_column(table.column_names.index(column), column, vectors)
    return table


@functools.cache
def _opened(folder: Path) -> _Encoder:
    """Return the encoder of a folder: our own for BERT's layout, sentence-transformers' for any other."""
    from apps.porting.files import read_config
    from apps.porting.sentences import SentenceEncoder

    if (kind := read_config(folder)["model_type"]) == "bert":
        encoder = SentenceEncoder(folder).to("cuda" if torch.cuda.is_available() else "cpu")
        return _Encoder(encoder.encode, _digest(encoder))
    if importlib.util.find_spec("sentence_transformers") is None:
        raise ValueError(
            f"{folder} holds a sentence encoder of type {kind!r}, for which sentence-transformers is needed: "
            "pip install sentence-transformers"
        )
    from sentence_transformers import SentenceTransformer  # type: ignore[import-not-found]

    model: Any = SentenceTransformer(str(folder))

    def encode(texts: Sequence[str], max_tokens: int) -> torch.Tensor:
        model.max_seq_length = max_tokens
        return torch.from_numpy(model.encode(list(texts), normalize_embeddings=True))

    return _Encoder(encode, _digest(model))


def _digest(module: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for value in module.state_dict().values():
        digest.update(value.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]
