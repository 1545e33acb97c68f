"""The encoding of images and texts that a checkpoint keeps: pixels, text tokens, and the attributes' classes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

import core
from apps.data.subwords import BOS_ID, EOS_ID, PAD_ID, SubwordConfig, Subwords, train_subwords
from apps.porting import subwords_of
from apps.porting.byte_pairs import FILE as CLIP_FILE, WORD_END, BytePairs, read_merges
from apps.porting.sentences import MINILM, WordPieces, encoder_folder
from apps.vision.encoding import PixelEncoding
from core.fields import Bounds, Checked

_START = "\N{LOWER ONE EIGHTH BLOCK}"  # what sentencepiece writes before a token that starts a word


@core.register_config
@dataclass(frozen=True)
class TextEncoding(Checked):
    """How a text becomes ids: by subwords learned from the training captions, or by the tokens of a published encoder.

    Attributes:
        subwords: the subwords, or None.
        pieces: a sentence encoder's WordPiece tokens, in the order of their ids, or none.
        lower_case: whether to lower the case; for WordPiece tokens also to drop accents. CLIP's tokens have no upper
            case.
        max_tokens: largest number of tokens that a model reads, start and end among them.
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
            raise ValueError("lower_case=False does not apply to CLIP's subwords, which have no upper case")
        if self.pieces and self.pieces[PAD_ID] != "[PAD]":
            raise ValueError(f"the word piece {PAD_ID} is {self.pieces[PAD_ID]!r}, not [PAD]")

    @cached_property
    def _published(self) -> WordPieces | BytePairs:
        """The tokenizer of a published encoder, without subwords."""
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
        """Return the ids of a text's first ``max_tokens`` tokens, start and end among them."""
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
        """Return the tokens of ids as they are spelled."""
        if self.subwords is None:
            return [self._published.pieces[i] for i in ids]
        return self.subwords.pieces(ids, "source")

    def marked(self, ids: Sequence[int]) -> list[str]:
        """Return the tokens of ids in sentencepiece's spelling, whatever their own is: with a mark before a token that
        starts a word, and brackets round one that is not text, such as ``<CLS>``."""
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
    rows = [torch.tensor(of_text, dtype=torch.int64) for of_text in ids]
    return pad_sequence(rows, batch_first=True, padding_value=PAD_ID) if rows else torch.zeros(0, 0, dtype=torch.int64)


@core.register_config
@dataclass(frozen=True)
class PairEncoding(PixelEncoding):
    """How images and texts become a model's input, and what its attributes' classes are.

    Attributes:
        text: the texts.
        attributes: names of the classes of each attribute, by its name.
    """

    text: TextEncoding = field(kw_only=True)
    attributes: dict[str, tuple[str, ...]] | None = field(default=None, kw_only=True)


# ---- the encoding that options ask for

MAX_TOKENS = 32
"""Pieces of a text that are read by default."""

_SUBWORDS = SubwordConfig(vocab_size=2000)


@dataclass(frozen=True)
class TextOptions:
    """The options of `ImageTextData` that are about texts; None: as the checkpoint says, else a default.

    Attributes:
        tokenizer, lower_case, max_tokens: as for `ImageTextData`.
    """

    tokenizer: SubwordConfig | None = None
    lower_case: bool | None = None
    max_tokens: int | None = None

    def encoding(self, captions: Sequence[str], cache: Path) -> TextEncoding:
        """Return the encoding that is asked for.

        Args:
            captions: the training captions, from which subwords are learned.
            cache: folder for learned subwords.

        Raises:
            ValueError: no captions, a vocabulary too small for their characters, or a path that cannot be read.
        """
        config = self.tokenizer or _SUBWORDS
        most = MAX_TOKENS if self.max_tokens is None else self.max_tokens
        if config.path is None:
            lowers = self.lower_case is not False
            learned = [caption.lower() for caption in captions] if lowers else captions
            return TextEncoding(train_subwords(learned, (), config, cache=cache), (), lowers, most)
        path = Path(config.path).expanduser()
        if config.path == MINILM:
            path = encoder_folder(MINILM, "data.tokenizer.path")
        if (path / CLIP_FILE).is_file():
            return TextEncoding(None, (), self.lower_case is not False, most, tuple(read_merges(path)))
        if (path / "vocab.txt").is_file():
            pieces = WordPieces.of(path)
            lowers = pieces.lower_case if self.lower_case is None else self.lower_case
            return TextEncoding(None, tuple(pieces.ids), lowers, most)
        return TextEncoding(subwords_of(path), (), self.lower_case is True, most)

    def check(self, text: TextEncoding, cache: Path) -> None:
        """Reject a checkpoint's encoding that is not the one that is asked for.

        For learned subwords, the kind and the number are compared.

        Raises:
            ValueError: naming both.
        """
        for name in ("lower_case", "max_tokens"):
            value = getattr(self, name)
            if value is not None and value != getattr(text, name):
                trained = f"which was trained with {name}={getattr(text, name)}: leave it out"
                raise ValueError(f"data.{name}={value} is not the checkpoint's, {trained}")
        if self.tokenizer is None:
            return
        kind = "subwords" if text.subwords else "subwords of CLIP" if text.merges else "subwords of a sentence encoder"
        if self.tokenizer.path is not None:
            other = self.encoding((), cache)
            is_same = (other.pieces, other.merges, other.subwords) == (text.pieces, text.merges, text.subwords)
            wanted = f"the {other.vocab_size:,} subwords of {self.tokenizer.path}"
        else:
            is_same = text.subwords is not None and text.vocab_size <= self.tokenizer.vocab_size
            wanted = f"{self.tokenizer.vocab_size:,} learned subwords"
        if not is_same:
            raise ValueError(
                f"data.tokenizer asks for {wanted}, and the checkpoint has {text.vocab_size:,} {kind}: leave it out"
            )


class EncodedTexts:
    """The ids of texts, one after the other.

    Args:
        texts: the texts.
        encoding: their encoding.
    """

    def __init__(self, texts: Sequence[str], encoding: TextEncoding) -> None:
        rows = encoding.rows(texts)
        self._bounds = torch.tensor(np.cumsum([0, *map(len, rows)]), dtype=torch.int64)
        self._ids = torch.tensor(np.fromiter((i for row in rows for i in row), np.int32))

    def __call__(self, text_B: Tensor) -> Tensor:
        """Return the ids of the texts of these numbers, int64 (B, L), padded with 0 to the longest of them."""
        begin_B, end_B = self._bounds[text_B], self._bounds[text_B + 1]
        place_L = torch.arange(int((end_B - begin_B).max()))
        at_BL = begin_B[:, None] + place_L
        is_text_BL = at_BL < end_B[:, None]
        return self._ids[at_BL.clamp_(max=len(self._ids) - 1)].long().masked_fill_(~is_text_BL, PAD_ID)
