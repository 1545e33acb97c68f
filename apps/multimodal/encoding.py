"""The encoding of images and texts that a checkpoint keeps: pixels, pieces of words, and the attributes' classes."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any

import torch
from torch import Tensor
from torchvision.transforms import v2

import core
from apps.data.subwords import BOS_ID, EOS_ID, PAD_ID, Subwords
from apps.porting.byte_pairs import WORD_END, BytePairs
from apps.porting.sentences import WordPieces
from apps.vision.encoding import evaluation_transform
from core.config.plain import from_plain, to_plain
from core.fields import Bounds, Checked

_START = "\N{LOWER ONE EIGHTH BLOCK}"  # what sentencepiece writes before a piece that begins a word


@core.register_config
@dataclass(frozen=True)
class TextEncoding(Checked):
    """How a text becomes ids: by subwords learned from the training captions, or by the pieces of a published encoder.

    Attributes:
        subwords: the subwords, or None.
        pieces: a sentence encoder's word pieces, in the order of their ids, or none.
        lower_case: whether to lower the case; for word pieces also to drop accents. CLIP's pieces have no upper case.
        max_tokens: largest number of pieces that a model reads, begin and end among them.
        merges: the merges of CLIP's tokenizer, the most frequent first, or none.

    Raises:
        ValueError: not one of the three vocabularies is given but several or none, ``[PAD]`` is not the piece 0, or
            ``max_tokens`` is below 3.
    """

    subwords: Subwords | None = None
    pieces: tuple[str, ...] = ()
    lower_case: bool = True
    max_tokens: Annotated[int, Bounds(3)] = 32
    merges: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.subwords is not None) + bool(self.pieces) + bool(self.merges) != 1:
            raise ValueError("a text encoding has either subwords, word pieces or merges")
        if self.merges and not self.lower_case:
            raise ValueError("lower_case=False does not apply to CLIP's pieces, which have no upper case")
        if self.pieces and self.pieces[PAD_ID] != "[PAD]":
            raise ValueError(f"the word piece {PAD_ID} is {self.pieces[PAD_ID]!r}, not [PAD]")

    @cached_property
    def _published(self) -> WordPieces | BytePairs:
        """The tokenizer of a published encoder; there are no subwords."""
        return BytePairs(self.merges) if self.merges else WordPieces(self.pieces, self.lower_case)

    @property
    def vocab_size(self) -> int:
        """Number of ids, the specials included."""
        return len(self._published.pieces) if self.subwords is None else self.subwords.size("source")

    @property
    def digest(self) -> str:
        """12 hex digits that tell one vocabulary from another."""
        vocabulary = (*self.pieces, *self.merges) if self.subwords is None else (self.subwords.digest,)
        return hashlib.sha256("\n".join((*vocabulary, str(self.lower_case))).encode()).hexdigest()[:12]

    def ids(self, text: str) -> list[int]:
        """Return the ids of a text's first ``max_tokens`` pieces, begin and end among them."""
        return self.rows([text])[0]

    def rows(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ``ids`` of each text. Many at once take far less time than one after the other."""
        if self.subwords is None:
            return [self._published.encode(text, self.max_tokens) for text in texts]
        texts = [text.lower() for text in texts] if self.lower_case else texts
        most = self.max_tokens - 2
        return [[BOS_ID, *ids[:most], EOS_ID] for ids in self.subwords.encode(texts, "source")]

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Return the ids of texts, int64 (B, L), padded with 0 to the longest."""
        return padded(self.rows(texts))

    def words(self, ids: Sequence[int]) -> list[str]:
        """Return the pieces of ids as they are spelled."""
        if self.subwords is None:
            return [self._published.pieces[i] for i in ids]
        return self.subwords.pieces(ids, "source")

    def marked(self, ids: Sequence[int]) -> list[str]:
        """Return the pieces of ids in sentencepiece's spelling, whatever their own is: with a mark before a piece that
        begins a word, and brackets round one that is no text, such as ``<CLS>``."""
        pieces = self.words(ids)
        if self.subwords is not None:
            return pieces
        if self.merges:  # the last piece of a word is marked
            apart = [True, *(before.endswith(WORD_END) or before.startswith("<") for before in pieces)]
            texts = [piece.removesuffix(WORD_END) for piece in pieces]
        else:
            apart = [not piece.startswith("##") for piece in pieces]
            texts = [_bracketed(piece.removeprefix("##")) for piece in pieces]
        return [
            f"{_START}{text}" if begins and not text.startswith("<") else text
            for text, begins in zip(texts, apart, strict=False)
        ]


def _bracketed(piece: str) -> str:
    """Return ``<CLS>`` for ``[CLS]``."""
    return f"<{piece[1:-1]}>" if len(piece) > 2 and piece[0] == "[" and piece[-1] == "]" else piece


def padded(ids: Sequence[Sequence[int]]) -> Tensor:
    """Return rows of ids as int64 (B, L), padded with 0 to the longest."""
    text_BL = torch.full((len(ids), max(map(len, ids), default=0)), PAD_ID, dtype=torch.int64)
    for row, of_text in zip(text_BL, ids, strict=True):
        row[: len(of_text)] = torch.tensor(of_text, dtype=torch.int64)
    return text_BL


@core.register_config
@dataclass(frozen=True)
class PairEncoding:
    """How images and texts become a model's input, and what its attributes' classes are.

    Attributes:
        text: the texts.
        image_size: height and width in pixels.
        in_chans: 1 or 3.
        mean, std: constants of each channel, pixels in [0, 1].
        eval_crop: share of the shorter side that is kept of an image.
        attributes: names of the classes of each attribute, by its name.
    """

    text: TextEncoding
    image_size: int
    in_chans: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    eval_crop: float = 1.0
    attributes: dict[str, tuple[str, ...]] | None = None

    def state(self) -> dict[str, Any]:
        """Return plain values, for a checkpoint."""
        return to_plain(self, PairEncoding)

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> PairEncoding:
        """Return the encoding of a checkpoint's ``state()``; a ``ValueError`` says if it has other fields."""
        return from_plain(state, PairEncoding, "the checkpoint's encoding")

    @property
    def transform(self) -> v2.Compose:
        """The ``evaluation_transform`` of decoded images."""
        return evaluation_transform(self.image_size, self.in_chans, self.eval_crop)
