"""A corpus in subword ids, on disk: made once, mapped into memory, and cut into batches from there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from apps.base.progress import each
from apps.data.array_files import ArrayFiles, ArrayWriter, save_texts
from apps.data.store import EncodedStore
from apps.data.subwords import BOS_ID, EOS_ID, PAD_ID, Side, Subwords
from apps.nlp.text.batches import TranslationBatch
from apps.nlp.text.corpora import SentencePairs

STORE = EncodedStore("text", version=1)
"""Texts and corpora in subword ids."""

_CHUNK = 10_000  # sentences encoded at a time
_SIDES: tuple[Side, Side] = ("source", "target")


def encode(lines: Sequence[str], subwords: Subwords, side: Side) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """Return the ids of all lines, one after the other, and the N + 1 bounds of each."""
    ids, ends = [np.empty(0, np.int32)], [np.zeros(1, np.int64)]
    for start in each(range(0, len(lines), _CHUNK), f"subwords of {len(lines):,} lines"):
        rows = subwords.encode(lines[start : start + _CHUNK], side)
        ends.append(np.cumsum([len(row) for row in rows], dtype=np.int64) + ends[-1][-1])
        ids.append(np.fromiter((i for row in rows for i in row), np.int32))
    return np.concatenate(ids), np.concatenate(ends)


def write_pairs(writer: ArrayWriter, split: str, pairs: SentencePairs, subwords: Subwords, *, keep_text: bool) -> None:
    """Write a split's ids, and its text where it is to be kept."""
    writer.save(f"{split}_pair", np.array(pairs.pair, np.int64))
    writer.save(f"{split}_corpus", np.array(pairs.corpus, np.int64))
    for side, lines in zip(_SIDES, (pairs.source, pairs.target), strict=True):
        ids, bounds = encode(lines, subwords, side)
        writer.save(f"{split}_{side}_ids", ids)
        writer.save(f"{split}_{side}_bounds", bounds)
        if keep_text:
            save_texts(writer, f"{split}_{side}_text", lines)


class EncodedPairs(Dataset[Any]):
    """The pairs of one split, read by whole batches: ``pairs.__getitems__(positions)`` is a `TranslationBatch`.

    Args:
        files: as `write_pairs` left them.
        split: its name.
        tags: id of the tag of each language pair; None: there are none.
        max_length: tokens of a side that a batch takes; longer ones are cut. Of a source the tag and the end count, of
            a target the start or the end, as a model reads and writes it.
        positions: the split's pairs that count, in order; None: all. A batch's ``index_B`` is the place among them.
    """

    def __init__(
        self,
        files: ArrayFiles,
        split: str,
        tags: Sequence[int] | None,
        max_length: int,
        positions: Tensor | None = None,
    ) -> None:
        self.files, self.split = files, split  # not the arrays: a worker process maps the files again
        self.tags = None if tags is None else torch.tensor(tags)
        self.max_length, self.positions = max_length, positions

    def __len__(self) -> int:
        return len(self._array("pair")) if self.positions is None else len(self.positions)

    def __getitem__(self, position: int) -> TranslationBatch:
        return self.__getitems__([position])

    def __getitems__(self, positions: Sequence[int] | Tensor) -> TranslationBatch:
        index_B = torch.as_tensor(positions, dtype=torch.int64)
        at_B = index_B if self.positions is None else self.positions[index_B]
        pair_B = self._array("pair")[at_B]
        tag_B = None if self.tags is None else self.tags[pair_B]
        source_BS = self._padded("source", at_B, self.max_length - 1 - (tag_B is not None), tag_B)
        target_BL = self._padded("target", at_B, self.max_length - 1, torch.full_like(pair_B, BOS_ID))
        return TranslationBatch(source_BS, target_BL, pair_B, index_B)

    def lengths(self) -> tuple[Tensor, Tensor]:
        """Return, int64 (N,) each, the tokens of each pair's source and target, specials included and uncut."""
        source_N = self._array("source_bounds").diff() + 1 + (self.tags is not None)
        target_N = self._array("target_bounds").diff() + 2
        return (source_N, target_N) if self.positions is None else (source_N[self.positions], target_N[self.positions])

    def groups(self) -> Tensor:
        """Return a number for each pair's corpus and language pair, int64 (N,)."""
        pair_N, corpus_N = self._array("pair"), self._array("corpus")
        group_N = corpus_N * (int(pair_N.max()) + 1 if len(pair_N) else 1) + pair_N
        return group_N if self.positions is None else group_N[self.positions]

    def _array(self, name: str) -> Tensor:
        return self.files[f"{self.split}_{name}"]

    def _padded(self, side: Side, at_B: Tensor, most: int, first_B: Tensor | None) -> Tensor:
        bounds = self._array(f"{side}_bounds")
        return pad(self._array(f"{side}_ids"), bounds[at_B], bounds[at_B + 1], most, first_B)


def pad(ids_M: Tensor, begin_B: Tensor, end_B: Tensor, most: int, first_B: Tensor | None) -> Tensor:
    """Put sentences side by side, each with ``EOS_ID`` and padding after it.

    Args:
        ids_M: ids of all sentences, one after the other.
        begin_B, end_B: bounds of each one.
        most: maximum number of ids per sentence; a longer one is cut.
        first_B: an id before each one; None: none.

    Returns:
        int64 (B, longest + 1 or 2).
    """
    length_B = (end_B - begin_B).clamp_(max=most)
    place_S = torch.arange(int(length_B.max()) + 1)
    # places past the end are read at the last id, and replaced
    at_BS = (begin_B[:, None] + place_S).clamp_(max=max(0, len(ids_M) - 1))
    ids_BS = ids_M[at_BS].long() if len(ids_M) else torch.zeros_like(at_BS)
    ids_BS = ids_BS.masked_fill_(place_S >= length_B[:, None], PAD_ID).masked_fill_(
        place_S == length_B[:, None], EOS_ID
    )
    return ids_BS if first_B is None else torch.cat((first_B[:, None], ids_BS), 1)
