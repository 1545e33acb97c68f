"""How captions become ids: the encoding that options ask for, and the captions in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from apps.data.subwords import PAD_ID, SubwordConfig, train_subwords
from apps.multimodal.encoding import TextEncoding
from apps.porting import subwords_of
from apps.porting.byte_pairs import FILE as CLIP_FILE
from apps.porting.byte_pairs import read_merges
from apps.porting.sentences import MINILM, WordPieces, encoder_folder

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
        """Refuse a checkpoint's encoding that is not the one that is asked for.

        Of subwords that were learned, the kind and the number are compared.

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
        pieces = "subwords" if text.subwords else "pieces of CLIP" if text.merges else "pieces of a sentence encoder"
        if self.tokenizer.path is not None:
            other = self.encoding((), cache)
            is_same = (other.pieces, other.merges, other.subwords) == (text.pieces, text.merges, text.subwords)
            wanted = f"the {other.vocab_size:,} pieces of {self.tokenizer.path}"
        else:
            is_same = text.subwords is not None and text.vocab_size <= self.tokenizer.vocab_size
            wanted = f"{self.tokenizer.vocab_size:,} learned subwords"
        if not is_same:
            raise ValueError(
                f"data.tokenizer asks for {wanted}, and the checkpoint has {text.vocab_size:,} {pieces}: leave it out"
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
